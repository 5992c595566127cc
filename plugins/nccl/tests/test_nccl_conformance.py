"""The backend keeps the contract of comm_core's hooks."""

from typing import Any

import pytest
from comm_core.testing import BackendConformance

FOREVER = "NCCL's kernels wait forever for a rank that lives and makes no call"


@pytest.mark.gpus(2)
class TestNccl(BackendConformance):
    backend = "nccl"
    world_sizes = (2,)

    @pytest.mark.xfail(reason=FOREVER, run=False)
    def test_a_call_without_one_rank_ends(self, kit: Any) -> None:
        super().test_a_call_without_one_rank_ends(kit)
