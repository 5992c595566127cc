"""The conformance kit behind `comm_core.testing`: ranks in processes, and what they check."""
