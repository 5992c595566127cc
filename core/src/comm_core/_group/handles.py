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
from comm_core._group.local_inputs import Request
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._handle import operators
from comm_core._handle.backend import Backend
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core.errors import CommTimeoutError, NegotiationError

__all__ = [
    "GroupState",
    "entries",
    "is_alive",
    "is_current",
    "remove",
    "remove_destroyed",
    "state_of",
    "translate_stage_errors",
    "used_incarnations",
]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class GroupState:
    """A group and what this process has for it.

    It keeps the process group object alive, so that no other can have its address; `remove_destroyed` lets go of those
    that torch destroyed.

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
    agreed: NegotiatedGroup | None = None
    sessions: list[Session] = dataclasses.field(default_factory=list)
    preparations: int = 0

    def serve(self, serving: Serving) -> Backend:
        """Make the group's handle."""
        self.serving, self.backend = serving, Backend(serving, self.name)
        return self.backend

    def serve_by(self, agreed: NegotiatedGroup) -> None:
        """Serve by this agreement; keep its sessions until the group is closed."""
        self.agreed = agreed
        for session in agreed.sessions.values():
            if not session.in_use:
                session.mark_in_use()
                self.sessions.append(session)

    def close_without_peers(self) -> None:
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


_entries: dict[str, GroupState] = {}
_lock = threading.Lock()
#: Incarnations of each group's control channel that this process was in, by the group's name; they outlive the entries.
used_incarnations: dict[str, set[str]] = {}


def state_of(group: dist.ProcessGroup | None, request: Request) -> GroupState:
    """The group's state; a new one, with `request`, where there is none.

    Raises:
        TypeError, ValueError: this process isn't in the group, or the group was destroyed.
    """
    member: dist.ProcessGroup | None = None
    name = ""
    if dist.is_available() and dist.is_initialized():
        # What torch hands to ranks outside a new group is no process group at all.
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
            raise ValueError(f"rank {dist.get_rank()} isn't in this group: skip the call there")
        member = dist.group.WORLD if group is None else group
        if not isinstance(member, dist.ProcessGroup):
            raise TypeError(f"a torch.distributed process group is needed, not {group!r}")
        if not is_alive(member):
            raise ValueError("this process group was destroyed, or isn't this process's own")
        name = member.group_name
    elif group is not None:
        raise ValueError("this process group was destroyed: torch.distributed isn't initialised")
    remove_destroyed()
    return _find_or_add(name, member, request)


def _find_or_add(name: str, group: dist.ProcessGroup | None, request: Request) -> GroupState:
    """The group's entry; a new one, with `request`, where there is none."""
    with _lock:
        if name not in _entries:
            _entries[name] = GroupState(name, group, request)
        return _entries[name]


def is_current(state: GroupState) -> bool:
    """Whether `state_of` finds this entry; who has waited for its lock asks, since the group may be closed by then."""
    with _lock:
        return _entries.get(state.name) is state


def entries() -> list[GroupState]:
    """All entries, in the order in which they were made."""
    with _lock:
        return list(_entries.values())


def remove(state: GroupState) -> None:
    """Find the group no more; its handle isn't closed by that."""
    if state.backend is not None:
        operators.unregister(state.backend)
    with _lock:
        if _entries.get(state.name) is state:
            del _entries[state.name]


def remove_destroyed() -> None:
    """Let go of groups that were destroyed without `comm.close`."""
    for state in entries():
        if state.group is not None and not is_alive(state.group):
            remove(state)
            state.close_without_peers()


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows the group and this process is in it."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


@contextlib.contextmanager
def translate_stage_errors(state: GroupState) -> Iterator[None]:
    """Raise what ends a group's stage in words that name the group.

    Raises:
        CommTimeoutError: ranks didn't come.
        NegotiationError: one failed.
    """
    try:
        yield
    except StageTimeoutError as error:
        raise CommTimeoutError(f"{state.title}: {error}", error.ranks) from error
    except StageAbortedError as error:
        raise NegotiationError(f"{state.title}: {error}") from error


def _listed(ranks: Sequence[int]) -> str:
    """Ranks for people: "0-3", "1,3"."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
