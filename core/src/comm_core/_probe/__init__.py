"""Probes of this process, its host and its driver; they never raise."""
