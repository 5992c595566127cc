"""Backends whose waits are bounded and end when a rank stops; each fails where a test asks for it."""

from __future__ import annotations

import base64
import functools
import time
from collections.abc import Callable
from typing import Any

import comm_core as comm
import recording_plugins as recording
import torch
import torch.distributed as dist
from faulty_plugins import DTYPES
from leaving_ranks import WAYS

#: How this process's backends fail, by the backend and the point; each fault happens once.
FAULTS: dict[tuple[str, str], Callable[[], object]] = {}
# Between two looks at the store: short for a rank that is about to come, longer for one that is missing.
_POLL_S, _LONGEST_POLL_S = 0.001, 0.02


class Session(recording.Recorded):
    """Sums over the side store, with bounded waits."""

    wait_timeout_s = 60.0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        keys = [f"{self.id}/{self.calls}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], base64.b64encode(bytes(tensor.view(-1).view(torch.uint8).tolist())).decode())
        deadline = time.monotonic() + self.wait_timeout_s
        poll_s = _POLL_S
        for rank, key in enumerate(keys):
            while not self.store.check([key]):
                if self.store.check([f"{self.id}/stopped"]):
                    raise comm.CommError("a rank stopped after a failure")
                if time.monotonic() > deadline:
                    raise comm.CommTimeoutError(f"rank {rank} didn't come", (rank,))
                time.sleep(poll_s)
                poll_s = min(2 * poll_s, _LONGEST_POLL_S)
        parts = [torch.frombuffer(bytearray(base64.b64decode(self.store.get(key))), dtype=tensor.dtype) for key in keys]
        return functools.reduce(torch.add, parts).reshape(tensor.shape)


class Bounded(recording.Records):
    """Serves up to `NBYTES`, in captures too."""

    NBYTES = 128

    def reach(self, point: str) -> None:
        FAULTS.pop((self.name, point), lambda: None)()

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        assert topology.one_host
        return comm.Available(self.priority, (comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=self.NBYTES),))

    def open(self, context: comm.GroupContext) -> Session:
        self.reach("connect")
        base = super().open(context)
        session = Session(base.id, base.rank, base.world_size, base.store, control=context.control)
        session.wait_timeout_s = context.wait_timeout_s
        return session

    def sum(self, session: Any, tensor: torch.Tensor) -> torch.Tensor:
        self.reach("before")
        total = super().sum(session, tensor)
        self.reach("after")
        return total

    @comm.hookimpl
    def check(self, session: Session) -> None:
        assert isinstance(session, Session)
        self.reach("check")

    @comm.hookimpl
    def abort(self, session: Session) -> None:
        self.note(session, "abort")
        session.store.set(f"{session.id}/stopped", "")


class BoundedMore(Bounded):
    NBYTES = 256


class Prepares(Bounded):
    """Serves larger messages once it is prepared."""

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        assert topology.one_host
        return comm.Available(self.priority, (comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=8),))

    @comm.hookimpl
    def pre_capture_init(self, session: Session, shapes: comm.Shapes) -> list[comm.Range]:
        assert isinstance(session, Session)
        assert shapes.max_tokens
        return [comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=self.NBYTES)]


def _raise(error: BaseException) -> None:
    raise error


#: The ways of `leaving_ranks`, and errors.
FAILURES: dict[str, Callable[[], object]] = {
    **WAYS,
    "raises": lambda: _raise(ValueError("no such symbol")),
    "raises a CommError": lambda: _raise(comm.CommError("the link is down")),
    "runs out of memory": lambda: _raise(torch.OutOfMemoryError("no room for 12 GiB")),
}


def plan(name: str, point: str, way: str, rank: int) -> None:
    """Let a backend fail at a point on one rank, once; clear earlier plans."""
    FAULTS.clear()
    if dist.get_rank() == rank:
        FAULTS[name, point] = FAILURES[way]
