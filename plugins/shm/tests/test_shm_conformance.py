"""The backend keeps the contract of comm_core's hooks."""

from comm_core.testing import BackendConformance


class TestShm(BackendConformance):
    backend = "shm"
    world_sizes = (3,)
    repeatable = equal_bits = True
