"""What runs in the ranks for the fault matrix: the life of a group, in which one rank fails once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from capture_ranks import capture
from comm_core._testing.cases import count_held
from comm_core.types import TERMINAL
from faulty_plugins import LOG, RELEASE
from handle_ranks import grown_since, hear, say
from leaving_ranks import SHAPES, Ending, ending
from matrix_plugins import NAME, PLAN

#: Elements of a float32 message that the backend serves.
NUMEL = 5

#: What a group does until a stage is reached, and afterwards.
STEPS: dict[str, tuple[str, ...]] = {
    "pre_capture_init": ("get", "prepare", "sum", "close"),
    "capture, enter": ("get", "capture", "capture", "sum", "close"),
    "capture, exit": ("get", "capture", "capture", "sum", "close"),
    "hot path": ("get", "call", "recover", "sum", "close"),
    "check": ("get", "sum", "check", "recover", "sum", "close"),
}
#: Those of the stages before.
FIRST_STEPS = ("get", "sum", "close")


@dataclasses.dataclass
class Report:
    """One rank's report of a cell.

    Attributes:
        steps: of each step its name, ending and time in seconds.
        plan: the verdict, reason and rank of the backend, and who serves; at the end of the steps.
        right: whether all sums after the fault were right.
        works: whether a group of the ranks that are left works afterwards.
        left: what the process holds more than before, by kind.
    """

    steps: list[tuple[str, Ending, float]] = dataclasses.field(default_factory=list)
    plan: tuple[Any, ...] = ()
    right: bool = True
    works: bool = False
    left: dict[str, int] = dataclasses.field(default_factory=dict)


def run_cells(cells: list[tuple[str, str]], culprit: int) -> list[Report]:
    """Run cells one after another on the rank `culprit`; each is a stage and a fault."""
    for _ in range(2):
        _works(dist.group.WORLD)
    return [_run_cell(f"cell {number}", *cell, culprit) for number, cell in enumerate(cells)]


def _run_cell(name: str, stage: str, fault: str, culprit: int) -> Report:
    size = dist.get_world_size()
    left = [rank for rank in range(size) if rank != culprit or fault != "SIGKILL"]
    report, before = Report(), count_held()
    _meet(f"{name} begins", range(size))
    RELEASE.clear()
    LOG.clear()
    PLAN.in_use, PLAN.fault = False, fault
    PLAN.stage = stage if dist.get_rank() == culprit else ""
    handle: list[comm.Backend] = []
    actions = _actions(handle, report)
    for step in STEPS.get(stage, FIRST_STEPS):
        if handle or step in ("get", "close"):
            begin = time.monotonic()
            found = ending(actions[step])
            report.steps.append((step, found, time.monotonic() - begin))
            if handle and step in ("get", "prepare", "recover"):
                candidate = handle[0].decision.candidate(NAME)
                report.plan = candidate and (candidate.verdict, candidate.reason, candidate.rank, handle[0].name)
    RELEASE.set()
    handle.clear()
    PLAN.stage = ""
    _meet(f"{name} ended", left)
    comm.close()
    group = dist.group.WORLD if len(left) == size else dist.new_group(left, use_local_synchronization=True)
    _meet(f"{name} closed", left)
    report.works = _works(group)
    _meet(f"{name} works", left)
    if len(left) == size:  # a group of its own isn't given back
        report.left = grown_since(before)
    return report


def _actions(handle: list[comm.Backend], report: Report) -> dict[str, Callable[[], object]]:
    def get() -> None:
        handle.append(comm.get_backend())
        PLAN.in_use = True

    def call() -> None:
        """Call as a program does that knows nothing of the fault."""
        for _ in range(3):
            handle[0].all_reduce(torch.ones(NUMEL))

    def sum_right() -> None:
        right = handle[0].all_reduce(torch.ones(NUMEL)).tolist() == [dist.get_world_size()] * NUMEL
        report.right = report.right and right

    def check() -> None:
        handle[0].check()

    return {
        "get": get,
        "call": call,
        "sum": sum_right,
        "prepare": lambda: comm.pre_capture_init(**SHAPES),
        "capture": lambda: capture((handle[0], NUMEL)),
        "check": check,
        "recover": comm.recover,
        "close": comm.close,
    }


def _works(group: Any) -> bool:
    backend = comm.get_backend(group, timeout_s=60)
    right = backend.all_reduce(torch.ones(NUMEL)).tolist() == [dist.get_world_size(group)] * NUMEL
    found = right and backend.name == (NAME if dist.get_world_size(group) > 1 else TERMINAL)
    comm.close(group)
    return found


def _meet(what: str, ranks: Any) -> None:
    say(what)
    hear(what, ranks)
