"""The handle that a caller holds, and what a call looks up and does."""
