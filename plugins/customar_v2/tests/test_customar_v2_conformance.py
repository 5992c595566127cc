"""The backend keeps the contract of comm_core's hooks."""

import pytest
from comm_core.testing import BackendConformance


@pytest.mark.gpus(2)
class TestCustomarV2(BackendConformance):
    backend = "customar_v2"
    world_sizes = (2,)
    repeatable = equal_bits = True
