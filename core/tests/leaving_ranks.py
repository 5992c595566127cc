"""A backend with which one rank leaves, vanishes or hangs; and what runs in the ranks for the tests of that."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import comm_core as comm
import faulty_plugins as faulty
import recording_plugins as recording
import torch
import torch.distributed as dist
from comm_core._group import states
from faulty_plugins import RELEASE
from handle_ranks import meet, say, warnings_of_core
from harness import install, side_store

#: An error's type or "ok", its text, and the ranks that it names.
Ending = tuple[str, str, tuple[int, ...]]
SHAPES: dict[str, Any] = {"max_tokens": 4, "hidden_size": 8, "dtype": torch.float32}
# How long a rank is ahead of another one, in seconds.
_AHEAD_S = 1.0


def _raise_interrupt() -> None:
    raise KeyboardInterrupt


class AlarmError(TimeoutError):
    """The handler of the program's own signal raises it."""


def _signal_the_program() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(_AHEAD_S)  # until the main thread has handled it


@contextlib.contextmanager
def alarms() -> Iterator[None]:
    """Let this process's signal handler raise `AlarmError`."""

    def raise_alarm(*_: object) -> None:
        raise AlarmError("the program's own")

    before = signal.signal(signal.SIGUSR1, raise_alarm)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


#: What happens at the point where the faulty rank fails.
WAYS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupted": lambda: os.kill(os.getpid(), signal.SIGINT),
    "signals the program": _signal_the_program,
    "raises KeyboardInterrupt": _raise_interrupt,
    "exits": lambda: sys.exit("no licence"),
    "hangs": lambda: RELEASE.wait(60),
}


class CountedSession(recording.Recorded):
    """Its plugin may fail when core asks how much memory it takes."""

    plugin: Any = None

    @property
    def memory_nbytes(self) -> int:  # type: ignore[override]
        if self.plugin is not None:
            self.plugin.reach("memory")
        return 0

    @memory_nbytes.setter
    def memory_nbytes(self, value: int) -> None:
        """Take what the dataclass sets."""


class Leaves(recording.Prepares):
    """Fails at one point in one way, once in each process."""

    def __init__(self, name: str, priority: int, *, on: Collection[int] = (), point: str = "", way: str = "") -> None:
        super().__init__(name, priority, on=on)
        self.point = point
        self.way = way

    def reach(self, point: str) -> None:
        if self.faulty and point == self.point:
            self.point = ""
            WAYS[self.way]()

    @comm.hookimpl
    def probe(self) -> dict[str, Any]:
        self.reach("probe")
        return {}

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        self.reach("is_available")
        return super().ask(topology)

    def open(self, context: comm.GroupContext) -> recording.Recorded:
        self.reach("connect")
        base = super().open(context)
        self.reach("connect, later")
        if self.point == "vote":
            if self.faulty:
                threading.Timer(_AHEAD_S, self.reach, ["vote"]).start()
            else:
                time.sleep(2 * _AHEAD_S)
        session = CountedSession(base.id, base.rank, base.world_size, base.store, control=base.control)
        session.plugin = self
        return session

    def sum(self, session: faulty.Session, tensor: torch.Tensor) -> torch.Tensor:
        self.reach("admission")
        return super().sum(session, tensor)

    def prepared(self, session: recording.Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        self.reach("pre_capture_init")
        return super().prepared(session, nbytes)

    def enter(self) -> None:
        self.reach("capture_ctx, enter")

    def before_exchange(self) -> None:
        self.reach("capture_ctx, exit")

    @comm.hookimpl
    def close(self, session: faulty.Session, orderly: bool) -> None:
        super().close(session, orderly)
        self.reach("close")


def install_leaver(folder: Path, name: str, priority: int, *, on: int, point: str, way: str) -> Path:
    """Install `Leaves` as the backend `name`."""
    arguments = f"{name!r}, {priority}, on=[{on}], point={point!r}, way={way!r}"
    return install(folder, name, f"import leaving_ranks\n\nplugin = leaving_ranks.Leaves({arguments})\n")


def ending(call: Callable[[], object]) -> Ending:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - the test looks at whatever it is
        return type(error).__name__, str(error), getattr(error, "ranks", ())
    return "ok", "", ()


@contextlib.contextmanager
def resumed(rank: int) -> Iterator[None]:
    """Resume this rank's process at the end of the block, should it be stopped; write down its number before."""
    if dist.get_rank() == rank:
        side_store().set("pid", str(os.getpid()))
    yield
    if dist.get_rank() != rank:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            os.kill(int(side_store().get("pid")), signal.SIGCONT)


def get(leaver: int, again: bool) -> dict[str, Any]:
    """Get a handle while one rank fails; then, if nobody was killed, get one once more."""
    faulty.LOG.clear()
    RELEASE.clear()
    with resumed(leaver), alarms():
        found: dict[str, Any] = {"ending": ending(comm.get_backend)}
    found["connected"] = sorted({name for name, _, event in faulty.LOG if event == "connect"})
    found["groups"] = len(states.all_states())
    RELEASE.set()
    if again:
        meet("all have failed")
        backend = comm.get_backend()
        x = torch.ones(2)
        found["again"] = (backend.name, backend.all_reduce(x).tolist())
        comm.close()
    return found


def prepare(leaver: int) -> dict[str, Any]:
    """Prepare while one rank fails; then use the handle, and close it."""
    RELEASE.clear()
    backend = comm.get_backend()
    say("got it")
    with resumed(leaver):
        found = {"ending": ending(lambda: comm.pre_capture_init(**SHAPES))}
    return found | {"call": ending(lambda: backend.all_reduce(torch.ones(2))), "close": ending(comm.close)}


def get_and_explain() -> tuple[Any, str]:
    """Get a handle; the candidate "first" and who serves."""
    RELEASE.clear()
    backend = comm.get_backend()
    found = (backend.decision.candidate("first"), backend.name)
    RELEASE.set()
    comm.close()
    return found


def close_two() -> dict[str, Any]:
    """Get a handle that two backends serve, and close it."""
    RELEASE.clear()
    backend = comm.get_backend()
    control = states.all_states()[0].control
    assert control is not None
    faulty.LOG.clear()
    with warnings_of_core() as texts:
        found = {"ending": ending(comm.close)}
    RELEASE.set()
    meet("all have closed")
    closed = sorted(name for name, _, event in faulty.LOG if event.startswith("close"))
    keys = side_store_free_keys(control)
    return found | {"names": sorted(backend.decision.candidate(n).name for n in closed), "texts": texts, "keys": keys}


def side_store_free_keys(control: Any) -> bool:
    """Whether the incarnation's last key is gone: every rank has left the channel."""
    return not control.call_store("looking", lambda store: store.check([f"{control.prefix}/left"]))


def capture_once() -> list[Ending]:
    """Capture twice; the first one fails."""
    RELEASE.clear()
    backend = comm.get_backend(timeout_s=8)

    def capture() -> None:
        with comm.capture(), recording.fake_capture():
            backend.all_reduce(torch.ones(2))

    first = ending(capture)
    RELEASE.set()
    meet("captured")
    return [first, ending(capture)]


class Blames(recording.Records):
    """One rank raises; the others only notice that it doesn't come, and are first to say so."""

    def __init__(self, name: str, priority: int, *, on: Collection[int] = (), point: str = "", way: str = "") -> None:
        super().__init__(name, priority, on=on)
        self.point = point
        self.way = way
        self.blamed = False

    def blame(self, point: str) -> None:
        if point != self.point:
            return
        if self.faulty:
            if not self.blamed:  # of many steps, the first
                time.sleep(_AHEAD_S)
            self.blamed = True
            raise RuntimeError("kernel burst: no such symbol")
        if self.way == "hangs":
            RELEASE.wait(60)
        raise (
            comm.CommTimeoutError("a peer didn't come", (1,))
            if self.way == "typed"
            else RuntimeError("Timed out waiting 6000ms for recv operation to complete")
        )

    def open(self, context: comm.GroupContext) -> recording.Recorded:
        self.blame("connect")
        return super().open(context)

    def sum(self, session: faulty.Session, tensor: torch.Tensor) -> torch.Tensor:
        self.blame("admission")
        return super().sum(session, tensor)


def install_blamer(folder: Path, point: str, way: str) -> Path:
    """Install `Blames` as the backend "first"."""
    source = (
        f"import leaving_ranks\n\nplugin = leaving_ranks.Blames('first', 300, on=[1], point={point!r}, way={way!r})\n"
    )
    return install(folder, "first", source)
