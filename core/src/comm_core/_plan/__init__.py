"""What follows from the ranks' evidence: pure functions of frozen data."""
