"""The vote of an engine's ranks on a handle, in the store of their group."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from comm_core import integration
from harness import side_store

if TYPE_CHECKING:
    from harness import Ranks


def vote(
    objections: list[str | None], silent: int | None, vote_s: float, *, sums: bool = True
) -> tuple[bool, list[str], list[float]]:
    """Vote in a group of all ranks, one of which may not vote at all; return whether it got a handle."""
    lines: list[str] = []
    log = logging.getLogger("engine")
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    log.addHandler(handler)
    rank, group = dist.get_rank(), dist.new_group() if sums else dist.group.WORLD
    assert group is not None
    handle = None
    if rank != silent:
        handle = integration.get_handle(
            "tp:0",
            group,
            group,
            package="comm-engine",
            engine="Engine",
            log=log,
            objection=objections[rank],
            vote_s=vote_s,
        )
    log.removeHandler(handler)
    tensor = torch.ones(3)
    if sums:  # on whatever the ranks have agreed, collectives of the engine's own go on
        dist.all_reduce(tensor, group=group)
    return handle is not None, lines, tensor.tolist()


def test_all_ranks_want_a_handle(ranks: Ranks) -> None:
    (first, lines, _), (second, silence, _) = ranks.run(vote, [None, None], None, 60.0)
    assert (first, second, silence) == (True, True, [])
    (line,) = lines
    assert line.startswith("INFO: group 'tp:0': all-reduces by comm-core ")


def test_one_objection_decides_for_all(ranks: Ranks) -> None:
    for got, (line,), total in ranks.run(vote, [None, "it is Sunday", None], None, 60.0, world_size=3):
        assert (got, total) == (False, [3.0] * 3)
        assert line == (
            "WARNING: group 'tp:0': comm-engine leaves all-reduces to Engine on all ranks: rank 1: it is Sunday"
        )


def test_a_rank_that_doesnt_vote_is_waited_for_under_a_deadline(ranks: Ranks) -> None:
    (got, (line,), total), (_, silence, _) = ranks.run(vote, [None, None], 1, 2.0)
    assert (got, total, silence) == (False, [2.0] * 3, [])
    assert "rank 1: no vote within 2 s: comm-engine isn't installed or isn't loaded there" in line


def late() -> tuple[bool, list[str], list[float]]:
    """The second rank votes after the first has given up."""
    if dist.get_rank() == 0:
        found = vote([None, None], None, 1.0, sums=False)
        side_store().set("gave up", "")
        return found
    side_store().wait(["gave up"])
    return vote([None, None], None, 60.0, sums=False)


def test_a_rank_that_votes_too_late_keeps_the_engines_all_reduce_at_once(ranks: Ranks) -> None:
    (first, _, _), (second, (line,), _) = ranks.run(late)
    assert (first, second) == (False, False)
    assert "rank 0: it had no vote of rank 1 within 1 s" in line


@pytest.mark.parametrize("device_group", [True, False])
def test_a_group_of_one_needs_no_vote(ranks: Ranks, device_group: bool) -> None:
    assert ranks.run(alone, device_group, world_size=1) == [None]


def alone(device_group: bool) -> object:
    group = dist.new_group()
    return integration.get_handle(
        "tp:0",
        group,
        group if device_group else None,
        package="comm-engine",
        engine="Engine",
        log=logging.getLogger("engine"),
    )
