"""Backends that can be suspended, each with a fault where a test asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import comm_core as comm
import recording_plugins as recording
import torch
import torch.distributed as dist
from faulty_plugins import DTYPES, LOG, RELEASE, Session
from leaving_ranks import WAYS

#: How this process's backends fail, by the backend and the point; each fault happens once.
FAULTS: dict[tuple[str, str], Callable[[], object]] = {}


class Suspends(recording.Records):
    """Serves up to 8 bytes. Its sums fail while it is suspended; its hooks exchange something."""

    NBYTES = 8

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.suspended: set[str] = set()

    def reach(self, point: str) -> None:
        FAULTS.pop((self.name, point), lambda: None)()

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        assert topology.one_host
        return comm.Available(self.priority, (comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=self.NBYTES),))

    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        assert session.id not in self.suspended
        self.reach("sum")
        return super().sum(session, tensor)

    @comm.hookimpl
    def suspend(self, session: recording.Recorded) -> None:
        self.change(session, "suspend")
        self.suspended.add(session.id)

    @comm.hookimpl
    def resume(self, session: recording.Recorded) -> None:
        self.change(session, "resume")
        self.suspended.remove(session.id)

    def change(self, session: recording.Recorded, hook: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert (session.id in self.suspended) is (hook == "resume")
        self.note(session, hook)
        self.reach(hook)
        gathered = session.control.all_gather([hook, session.rank, session.id])
        assert gathered == [[hook, rank, session.id] for rank in range(session.world_size)]
        self.reach(f"{hook}, later")

    @comm.hookimpl
    def check(self, session: recording.Recorded) -> None:
        assert session.id not in self.suspended
        self.reach("check")

    @comm.hookimpl
    def pre_capture_init(self, session: recording.Recorded, shapes: comm.Shapes) -> None:
        assert session.id not in self.suspended
        assert shapes.max_tokens
        self.reach("pre_capture_init")

    @comm.hookimpl
    def limits(self, session: recording.Recorded) -> dict[str, float]:
        assert session.id not in self.suspended
        return {"none": 1.0}


class SuspendsMore(Suspends):
    NBYTES = 128


class Minimal:
    """A plugin without `connect`: its session is the context."""

    COMM_HOOK_API = (1, 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @comm.hookimpl
    def all_reduce(self, session: comm.GroupContext, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        out = tensor.clone() if out is None else out.copy_(tensor)
        dist.all_reduce(out, group=session.group)
        return out

    @comm.hookimpl
    def suspend(self, session: comm.GroupContext) -> None:
        LOG.append(("minimal", "", f"suspend {session.control.all_gather(session.rank)}"))

    @comm.hookimpl
    def resume(self, session: comm.GroupContext) -> None:
        LOG.append(("minimal", "", f"resume {session.control.all_gather(session.rank)}"))


def raise_error() -> None:
    raise MemoryError("no room for 12 GiB")


def plan(name: str, point: str, way: str, rank: int) -> None:
    """Let a backend fail at a point on one rank; clear earlier plans."""
    FAULTS.clear()
    RELEASE.clear()
    if dist.get_rank() == rank:
        FAULTS[name, point] = {**WAYS, "raises": raise_error}[way]
