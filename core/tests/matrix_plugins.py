"""A backend for the fault matrix: one rank fails at one stage in one way, once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import comm_core as comm
import recoverable_plugins as recoverable
import torch
from faulty_plugins import RELEASE

NAME = "faulty"
#: How long a stopped process is stopped, and a slow hook sleeps, in seconds: more, and less, than the deadlines.
STOPPED_S, SLOW_S = 7, 1.0

#: What fails in a cell: the stages in the order in which a group meets them.
STAGES = (
    *("probe", "is_available", "connect", "vote", "admission", "pre_capture_init"),
    *("capture, enter", "capture, exit", "hot path", "check", "close"),
)


def _raise(error: BaseException) -> None:
    raise error


def _stop_and_continue() -> None:
    """Stop this process; another one lets it go on."""
    with subprocess.Popen(["sh", "-c", f"sleep {STOPPED_S}; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


#: How a hook fails; one of the strings is returned, for the hook to do.
FAULTS: dict[str, Callable[[], object]] = {
    "raise": lambda: _raise(RuntimeError("it broke")),
    "SystemExit": lambda: sys.exit("no licence"),
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "out of memory": lambda: _raise(torch.OutOfMemoryError("no room for 12 GiB")),
    "hang": lambda: RELEASE.wait(60) and None,
    "slow": lambda: time.sleep(SLOW_S),
    "SIGSTOP, then on": _stop_and_continue,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "wrong data": lambda: "wrong data",
    "wrong type or shape": lambda: "wrong type or shape",
    "input changed": lambda: "input changed",
}
_DATA = {
    "wrong data": {"vote", "admission", "pre_capture_init", "hot path"},
    "wrong type or shape": {*STAGES[:6], "capture, enter", "hot path"},
    "input changed": {"admission", "hot path"},
}


def applies(stage: str, fault: str) -> bool:
    """Whether a hook can fail so at this stage: not every hook returns or takes something."""
    return stage in _DATA.get(fault, STAGES)


@dataclasses.dataclass
class Plan:
    """This process's next fault.

    Attributes:
        stage, fault: what fails and how; "" for nothing.
        in_use: whether the handle serves calls: a sum is then no admission test.
    """

    stage: str = ""
    fault: str = ""
    in_use: bool = False


PLAN = Plan()


def strike(stage: str) -> object:
    if PLAN.stage != stage:
        return None
    PLAN.stage = ""
    return FAULTS[PLAN.fault]()


class Session(recoverable.Session):
    @property
    def memory_nbytes(self) -> Any:  # type: ignore[override]
        found = strike("vote")
        return {"wrong data": 1 << 40, "wrong type or shape": "plenty"}.get(str(found), 0)

    @memory_nbytes.setter
    def memory_nbytes(self, value: Any) -> None:
        """Take what the dataclass sets."""


class Faulty(recoverable.Bounded):
    """Serves small messages, also in captures; `FAULTS` says how it fails."""

    @comm.hookimpl
    def probe(self) -> Any:
        return 7 if strike("probe") else {}

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        assert topology.one_host
        ranges = (comm.Range("all_reduce", max_nbytes=self.NBYTES, dtypes=("float32",)),)  # a short admission test
        found: Any = strike("is_available")
        return found or comm.Available(self.priority, ranges)

    def open(self, context: comm.GroupContext) -> Any:
        if strike("connect"):
            return None
        base = super().open(context)
        session = Session(base.id, base.rank, base.world_size, base.store, control=base.control)
        session.wait_timeout_s = base.wait_timeout_s
        return session

    def sum(self, session: Any, tensor: torch.Tensor) -> torch.Tensor:
        found = strike("hot path" if PLAN.in_use else "admission")
        total: torch.Tensor = super().sum(session, tensor)
        if found == "input changed":
            tensor.add_(1)
        return {"wrong data": total + 1, "wrong type or shape": total.new_zeros(total.numel() + 1)}.get(
            str(found), total
        )

    @comm.hookimpl
    def pre_capture_init(self, session: Any, shapes: comm.Shapes) -> Any:
        assert isinstance(session, Session)
        assert shapes.max_tokens
        found = strike("pre_capture_init")
        nowhere = [comm.Range("all_reduce", min_nbytes=1 << 50)]
        return {"wrong data": nowhere, "wrong type or shape": 7}.get(str(found))

    @comm.hookimpl
    def capture_ctx(self, session: Any) -> Any:
        return None if strike("capture, enter") else self._captured(session)

    @contextlib.contextmanager
    def _captured(self, session: Any) -> Any:
        try:
            yield
        except BaseException:
            session.rows.clear()
            raise
        rows, session.rows = session.rows, []
        if rows:
            strike("capture, exit")
            session.control.all_gather(rows)

    @comm.hookimpl
    def check(self, session: Any) -> None:
        assert isinstance(session, Session)
        strike("check")

    @comm.hookimpl
    def close(self, session: Any, orderly: bool) -> None:
        super().close(session, orderly)
        strike("close")
