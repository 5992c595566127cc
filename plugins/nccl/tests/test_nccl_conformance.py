"""The backend keeps the contract of comm_core's hooks."""

import pytest
from comm_core.testing import BackendConformance


@pytest.mark.gpus(2)
class TestNccl(BackendConformance):
    backend = "nccl"
    world_sizes = (2,)
