"""The harness tells what went wrong in a rank, and is as good as new afterwards."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from harness import DEAD, RankError

if TYPE_CHECKING:
    from harness import Ranks


def total(x: int) -> int:
    tensor = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(tensor)
    return int(tensor.item())


def fail(how: str) -> None:
    if dist.get_rank() == 1:
        sys.stderr.write("what it said\n")
        sys.stderr.flush()
        if how == "raises":
            raise LookupError("its own words")
        if how == "exits":
            os._exit(3)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "LookupError: its own words"),
        ("exits", "rank 1 exited"),
        ("is killed", "rank 1 killed"),
        ("hangs", "in fail\n"),  # where its stack was
    ],
)
def test_a_rank_that_goes_wrong(ranks: Ranks, how: str, told: str) -> None:
    with pytest.raises(RankError) as caught:
        # Imports and all, on a busy machine; for the rank that hangs, after that it is over.
        ranks.run(fail, how, deadline_s=20)
    assert "ranks [1] of fail failed" in str(caught.value)
    assert "what it said" in str(caught.value)
    assert told in str(caught.value)
    assert ranks.run(total, 5, world_size=3) == [18, 18, 18]


def test_a_rank_that_dies_as_announced(ranks: Ranks) -> None:
    assert ranks.run(fail, "is killed", dying=[1]) == [None, DEAD]
    assert ranks.run(total, 5) == [11, 11]


def test_a_rank_that_survives_its_announced_death(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] of fail failed"):
        ranks.run(fail, "is killed", dying=[0, 1])
