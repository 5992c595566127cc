"""Exchanges between the ranks of a group outside the hot path, and the deadlines of all waits."""
