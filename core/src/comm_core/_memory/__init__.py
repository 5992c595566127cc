"""Shared buffers behind `comm_core.memory`: memory of a device or of the CPU, and the exchange of open files."""
