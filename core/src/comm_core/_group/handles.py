"""The process groups of this process that have a handle, or are getting one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from comm_core._control.stage import StageAbortedError, StageTimeoutError
from comm_core._control.store import Control
from comm_core._group.negotiation import Agreed, Request
from comm_core._handle import operators
from comm_core._handle.backend import Backend
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core.errors import CommTimeoutError, NegotiationError

__all__ = ["Entry", "find", "forget", "found", "live", "lives", "seen", "sweep", "told"]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class Entry:
    """A group and what this process has for it.

    It keeps the process group object alive, so that no other can have its address; `sweep` lets go of those that torch
    destroyed.

    Attributes:
        name: torch's name of the group; "" for a process alone.
        group: None for a process alone.
        request: what the caller asked for.
        lock: held while the ranks agree.
        backend: the handle.
        serving: what the handle serves by.
        control: the group's control channel.
        agreed: what the ranks agreed on last.
        sessions: every session that the handle ever served by.
        preparations: calls of `comm.pre_capture_init`.
    """

    name: str
    group: dist.ProcessGroup | None
    request: Request
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    backend: Backend | None = None
    serving: Serving | None = None
    control: Control | None = None
    agreed: Agreed | None = None
    sessions: list[Session] = dataclasses.field(default_factory=list)
    preparations: int = 0

    def serve(self, serving: Serving) -> Backend:
        """Make the group's handle."""
        self.serving, self.backend = serving, Backend(serving, self.name)
        return self.backend

    def hold(self, agreed: Agreed) -> None:
        """Serve by this agreement; keep its sessions until the group is closed."""
        self.agreed = agreed
        for session in agreed.sessions.values():
            if not session.in_use:
                session.mark_in_use()
                self.sessions.append(session)

    def abandon(self) -> None:
        """Close a group that torch destroyed: its peers can't be reached any more."""
        if self.sessions:
            _log.warning("%s was destroyed before comm.close(group): closing without its peers", self.title)
        if self.serving is not None:
            self.serving.retire(f"{self.title} was destroyed")
        for session in self.sessions:
            session.close(orderly=False)

    @property
    def title(self) -> str:
        """Names the group for people."""
        if self.group is None:
            return "this process, alone"
        if self.control is None:
            return f"group {self.name!r}"
        return f"group {self.name!r} (ranks {_listed(self.control.global_ranks)})"


_entries: dict[str, Entry] = {}
_lock = threading.Lock()
#: Incarnations of each group's control channel that this process was in, by the group's name; they outlive the entries.
seen: dict[str, set[str]] = {}


def find(name: str, group: dist.ProcessGroup | None, request: Request) -> Entry:
    """The group's entry; a new one, with `request`, where there is none."""
    with _lock:
        if name not in _entries:
            _entries[name] = Entry(name, group, request)
        return _entries[name]


def found(entry: Entry) -> bool:
    """Whether `find` finds this entry; who has waited for its lock asks, since the group may be closed by then."""
    with _lock:
        return _entries.get(entry.name) is entry


def live() -> list[Entry]:
    """All entries, in the order in which they were made."""
    with _lock:
        return list(_entries.values())


def forget(entry: Entry) -> None:
    """Find the group no more; its handle isn't closed by that."""
    if entry.backend is not None:
        operators.strike(entry.backend)
    with _lock:
        if _entries.get(entry.name) is entry:
            del _entries[entry.name]


def sweep() -> None:
    """Let go of groups that were destroyed without `comm.close`."""
    for entry in live():
        if entry.group is not None and not lives(entry.group):
            forget(entry)
            entry.abandon()


def lives(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows the group and this process is in it."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


@contextlib.contextmanager
def told(entry: Entry) -> Iterator[None]:
    """Raise what ends a group's stage in words that name the group.

    Raises:
        CommTimeoutError: ranks didn't come.
        NegotiationError: one failed.
    """
    try:
        yield
    except StageTimeoutError as error:
        raise CommTimeoutError(f"{entry.title}: {error}", error.ranks) from error
    except StageAbortedError as error:
        raise NegotiationError(f"{entry.title}: {error}") from error


def _listed(ranks: Sequence[int]) -> str:
    """Ranks for people: "0-3", "1,3"."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
