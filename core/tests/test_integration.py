"""The vote of an engine's ranks on a handle, in the store of their group."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from comm_core import integration
from harness import install, side_store

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks

ADDING = """
import comm_core
import torch.distributed as dist

class plugin:
    COMM_HOOK_API = (1, 0)

    @staticmethod
    @comm_core.hookimpl
    def is_available(topology):
        return comm_core.Available(500, (comm_core.Range("all_reduce", dtypes=("float32",), max_nbytes=1 << 10),))

    @staticmethod
    @comm_core.hookimpl
    def all_reduce(session, tensor, out):
        result = tensor.clone() if out is None else out.copy_(tensor)
        dist.all_reduce(result, group=session.group)
        return result
"""


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


def test_all_ranks_want_a_handle(ranks: Ranks, tmp_path: Path) -> None:
    path = [[install(tmp_path, "adding", ADDING)]] * 2
    (first, lines, _), (second, silence, _) = ranks.run(vote, [None, None], None, 60.0, path=path)
    assert (first, second, silence) == (True, True, [])
    (line,) = lines
    assert line.startswith("INFO: group 'tp:0': all-reduces by comm-core ")
    assert line.endswith(", the smallest by adding")


@pytest.mark.parametrize("installed", [True, False])
def test_a_group_without_a_backend_gets_a_warning_with_the_reasons(
    ranks: Ranks, tmp_path: Path, installed: bool
) -> None:
    path = [[install(tmp_path, "adding", ADDING)]] * 2 if installed else []
    env = {"COMM_CORE_DISABLE": "adding"}
    (first, lines, _), (second, silence, _) = ranks.run(vote, [None, None], None, 60.0, path=path, env=env)
    assert (first, second, silence) == (True, True, [])
    (line,) = lines
    assert line.startswith(
        "WARNING: group 'tp:0': no backend of comm-core serves all-reduces, so they go to torch.distributed, not to "
        "Engine's own: " + ("adding: " if installed else "no plugin is installed")
    )
    assert ("COMM_CORE_DISABLE" in line) is installed
    assert line.endswith("or set COMM_ENGINE=0 to keep Engine's own")


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
