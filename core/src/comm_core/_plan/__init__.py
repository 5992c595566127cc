"""Decide a group's candidates and routes from the ranks' evidence: pure functions of frozen data."""
