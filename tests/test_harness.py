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


def fail(*hows: str) -> None:
    """Fail in this rank's way; "" for none."""
    rank, how = dist.get_rank(), hows[dist.get_rank()]
    # Otherwise a rank might still connect to one that has failed, and fail, too.
    side_store().set(f"rank {rank} is connected", "")
    side_store().wait([f"rank {peer} is connected" for peer in range(len(hows))])
    if not how:
        return
    sys.stderr.write(f"rank {rank} on stderr\n")
    sys.stderr.flush()
    if how == "raises":
        raise LookupError("the rank's message")
    if how == "exits":
        os._exit(3)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def test_failing_ranks_are_reported(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(fail, "raises", "", "exits", "is killed", world_size=4)
    report = str(caught.value)
    assert "ranks [0, 2, 3] of fail failed" in report
    for reported in ("LookupError: the rank's message", "rank 1 returned", "rank 2 exited", "rank 3 killed"):
        assert reported in report
    assert [f"rank {rank} on stderr" in report for rank in range(4)] == [True, False, True, True]
    assert ranks.run(total, 5) == [11, 11]


def test_a_rank_that_dies_as_expected(ranks: Ranks) -> None:
    assert ranks.run(fail, "", "is killed", dying=[1]) == [None, DEAD]
    assert ranks.run(total, 5) == [11, 11]


def test_a_hanging_rank_is_reported_with_its_stack(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        # Long enough for the imports on a busy machine; the hanging rank ends after it.
        ranks.run(fail, "", "hangs", deadline_s=20)
    assert "ranks [1] of fail failed" in str(caught.value)
    assert "rank 1 on stderr" in str(caught.value)
    assert "in fail\n" in str(caught.value)
    assert ranks.run(total, 5) == [11, 11]


def test_a_rank_that_survives_an_expected_death(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] of fail failed"):
        ranks.run(fail, "", "is killed", dying=[0, 1])
    assert ranks.run(total, 5, world_size=3) == [18, 18, 18]
