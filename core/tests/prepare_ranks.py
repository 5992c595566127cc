"""What runs in the ranks for test_prepare.py."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from capture_ranks import events
from faulty_plugins import LOG
from handle_ranks import Outcome, hear, outcome, say

SHAPES: dict[str, Any] = {"max_tokens": 4, "hidden_size": 8, "dtype": torch.float32}


def who(backend: comm.Backend, *sizes: int) -> list[str]:
    """Who serves messages of so many bytes: by the plan, and as seen."""
    seen = []
    for nbytes in sizes:
        LOG.clear()
        x = torch.full((nbytes // 4,), 1.0)
        assert torch.equal(backend.all_reduce(x), x * dist.get_world_size(backend_group(backend)))
        called = [name for name, _, event in LOG if event == "all_reduce"]
        route = backend.decision.route("all_reduce", "eager", "cpu", "float32")
        assert (called or ["torch_distributed"]) == [route.backend_for(nbytes)]
        seen += called or ["torch_distributed"]
    return seen


def backend_group(backend: comm.Backend) -> Any:
    """The process group of a handle."""
    return dist.distributed_c10d._resolve_process_group(backend.group_name)  # type: ignore[attr-defined]


def prepare(steps: Sequence[dict[str, Any]], sizes: Sequence[int] = (8, 128, 256, 260)) -> dict[str, Any]:
    """Prepare the world for each step's shapes; who serves before and after each, and what became of it."""
    backend = comm.get_backend()
    found: dict[str, Any] = {
        "served": [who(backend, *sizes)],
        "outcomes": [],
        "candidates": [backend.decision.candidate("first")],
        "events": [],
    }
    for step in steps:
        LOG.clear()
        found["outcomes"].append(outcome(lambda: comm.pre_capture_init(**step)))  # noqa: B023
        found["events"].append(events())
        assert comm.get_backend() is backend
        found["served"].append(who(backend, *sizes))
        found["candidates"].append(backend.decision.candidate("first"))
    LOG.clear()
    comm.close()
    found["closed"] = events()
    return found


def prepare_a_named_one() -> Outcome:
    comm.get_backend(backends=("first",))
    return outcome(lambda: comm.pre_capture_init(**SHAPES))


def prepare_differently(shapes: Sequence[dict[str, Any]]) -> tuple[Outcome, list[str], Outcome, list[str]]:
    backend = comm.get_backend()
    LOG.clear()
    first = outcome(lambda: comm.pre_capture_init(**shapes[dist.get_rank()]))
    log = events()
    return first, log, outcome(lambda: comm.pre_capture_init(**SHAPES)), who(backend, 128)


def prepare_groups(groups: Sequence[Sequence[int]]) -> list[tuple[list[int], list[str]]]:
    """Groups that share ranks; one made after the others were prepared."""
    made = [(list(ranks), dist.new_group(ranks)) for ranks in groups]
    mine = [(ranks, group) for ranks, group in made if isinstance(group, dist.ProcessGroup)]
    handles = [comm.get_backend(group) for _, group in mine]
    comm.pre_capture_init(**SHAPES)
    world = comm.get_backend()
    served = [(ranks, who(handle, 128)) for (ranks, _), handle in zip(mine, handles, strict=True)]
    before = who(world, 128)
    comm.pre_capture_init(**SHAPES)
    return [*served, ([], before + who(world, 128))]


def prepare_late(absent: int) -> tuple[Outcome, Outcome, Outcome]:
    """One rank doesn't come; then all do."""
    backend = comm.get_backend(timeout_s=10)
    if dist.get_rank() == absent:
        hear("failed", [rank for rank in range(dist.get_world_size()) if rank != absent])
        with contextlib.suppress(ValueError):
            comm.pre_capture_init(**SHAPES | {"max_tokens": 0})  # it is wrong before anything is sent
        found = ("ok", "absent")
    else:
        found = outcome(lambda: comm.pre_capture_init(**SHAPES))
        say("failed")
    before = outcome(lambda: who(backend, 8, 128))
    comm.pre_capture_init(**SHAPES)
    return found, before, outcome(lambda: who(backend, 8, 128))
