"""The harness reports failures of ranks, and works again after each."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from harness import DEAD, RankError, side_store

if TYPE_CHECKING:
    from harness import Ranks


def total(x: int) -> int:
    tensor = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(tensor)
    return int(tensor.item())


def fail(how: str) -> None:
    if dist.get_rank() == 0:
        side_store().set("rank 0 is connected", "")
    else:
        # Otherwise rank 0 might still connect to this rank, and fail, too.
        side_store().wait(["rank 0 is connected"])
        sys.stderr.write("text on stderr\n")
        sys.stderr.flush()
        if how == "raises":
            raise LookupError("the rank's message")
        if how == "exits":
            os._exit(3)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


@pytest.mark.parametrize(
    ("how", "reported"),
    [
        ("raises", "LookupError: the rank's message"),
        ("exits", "rank 1 exited"),
        ("is killed", "rank 1 killed"),
        ("hangs", "in fail\n"),  # its stack
    ],
)
def test_a_failing_rank_is_reported(ranks: Ranks, how: str, reported: str) -> None:
    with pytest.raises(RankError) as caught:
        # Long enough for the imports on a busy machine; the hanging rank ends after it.
        ranks.run(fail, how, deadline_s=20)
    assert "ranks [1] of fail failed" in str(caught.value)
    assert "text on stderr" in str(caught.value)
    assert reported in str(caught.value)
    assert ranks.run(total, 5, world_size=3) == [18, 18, 18]


def test_a_rank_that_dies_as_expected(ranks: Ranks) -> None:
    assert ranks.run(fail, "is killed", dying=[1]) == [None, DEAD]
    assert ranks.run(total, 5) == [11, 11]


def test_a_rank_that_survives_an_expected_death(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] of fail failed"):
        ranks.run(fail, "is killed", dying=[0, 1])
