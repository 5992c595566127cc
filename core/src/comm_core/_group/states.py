"""The state of each process group that has a handle in this process, or is getting one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from comm_core._control.stage import StageAbortedError, StageTimeoutError
from comm_core._control.store import Control
from comm_core._group.local_inputs import Request
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._handle import operators
from comm_core._handle.backend import Backend
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core.errors import CommError, CommTimeoutError, NegotiationError

__all__ = [
    "Group",
    "GroupState",
    "all_states",
    "change_all",
    "close_listeners",
    "get_or_create_state",
    "is_alive",
    "is_current",
    "plain_group",
    "process_group_of",
    "remove",
    "remove_destroyed",
    "translate_stage_errors",
    "used_incarnations",
]

#: What names a group in the public functions; a mesh needs to have one dimension.
Group: TypeAlias = dist.ProcessGroup | DeviceMesh

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class GroupState:
    """One group's state in this process.

    It keeps the process group object alive, so that no other object gets its address; `remove_destroyed` releases the
    groups that torch destroyed.

    Attributes:
        name: torch's name of the group; "" without a process group.
        group: the process group; None for this process alone.
        request: the caller's arguments to `get_backend`.
        lock: held while this rank negotiates, prepares, suspends, resumes or closes.
        backend: the handle.
        serving: the plan that the handle serves by.
        control: the group's control channel.
        negotiated: the outcome of the last negotiation or preparation.
        sessions: every session that was ever in use, and isn't closed yet.
        preparations: the number of calls of `comm.pre_capture_init`.
        suspensions: the number of calls of `comm.suspend` and `comm.resume` that were exchanged.
        recoveries: the number of calls of `comm.recover` that were exchanged, in the current incarnation.
    """

    name: str
    group: dist.ProcessGroup | None
    request: Request
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    backend: Backend | None = None
    serving: Serving | None = None
    control: Control | None = None
    negotiated: NegotiatedGroup | None = None
    sessions: list[Session] = dataclasses.field(default_factory=list)
    preparations: int = 0
    suspensions: int = 0
    recoveries: int = 0

    def create_backend(self, serving: Serving) -> Backend:
        """Create the group's handle, which serves by `serving`."""
        negotiated = self.negotiated
        compares = negotiated is not None and negotiated.member.compares_calls
        self.serving, self.backend = serving, operators.create_backend(serving, self.name, compares_calls=compares)
        return self.backend

    def register(self, backend: Backend) -> None:
        """Let operators find the handle by the group's name, and that of the world by "", too."""
        is_world = self.group is not None and self.group is plain_group(dist.group.WORLD)
        operators.register((self.name, "") if is_world else (self.name,), backend)

    def adopt(self, negotiated: NegotiatedGroup) -> None:
        """Adopt the outcome of a negotiation; keep its sessions until the group is closed."""
        self.negotiated = negotiated
        for session in negotiated.sessions.values():
            if not session.in_use:
                session.mark_in_use()
                self.sessions.append(session)

    def change_incarnation(self, control: Control) -> None:
        """Exchange over `control` from now on, and count the exchanged calls from 0, as all ranks do together."""
        self.control = control
        self.preparations = self.suspensions = self.recoveries = 0

    def announce_end(self) -> None:
        """Call the `close_listeners` if the group has a handle."""
        if self.backend is not None:
            for listener in close_listeners:
                listener(self)

    def close_without_peers(self) -> None:
        """Close a group that torch destroyed: its peers can no longer be reached."""
        if self.sessions:
            _log.warning("%s was destroyed before comm.close(group): closing it without its peers", self.title)
        self.announce_end()
        if self.serving is not None:
            self.serving.retire(f"{self.title} was destroyed")
        for session in self.sessions:
            session.close(orderly=False)

    @property
    def title(self) -> str:
        """The group's name and ranks, for messages."""
        if self.group is None:
            return "this process, alone"
        if self.control is None:
            return f"group {self.name!r}"
        return f"group {self.name!r} (ranks {_format_ranks(self.control.global_ranks)})"


#: Called with the state of each group whose handle is about to close, before its sessions do. They may not raise.
close_listeners: list[Callable[[GroupState], object]] = []

_states: dict[str, GroupState] = {}
_lock = threading.Lock()
#: The incarnations that this process has joined, by the group's name; they outlive the group's state.
used_incarnations: dict[str, set[str]] = {}


# The world that this process inherited by a fork: its connections belong to the parent process.
_inherited_world: dist.ProcessGroup | None = None
# Sessions that this process inherited: never closed here, since the parent process uses them.
_inherited_states: list[GroupState] = []


def _forget_parent() -> None:
    """Make the handles that a forked child inherited raise: its calls would take the turns of its parent's."""
    global _lock, _inherited_world  # noqa: PLW0603 - the child has one thread, and another thread may hold the lock
    _lock = threading.Lock()
    if dist.is_available() and dist.is_initialized():
        _inherited_world = dist.group.WORLD
    for state in list(_states.values()):
        if state.group is not None and state.serving is not None:
            state.serving.retire(
                f"{state.title}: this handle belongs to process {os.getppid()}, which forked this one. Use it there, "
                "or start this process with the method 'spawn' and initialise torch.distributed in it"
            )
            _inherited_states.append(_states.pop(state.name))


os.register_at_fork(after_in_child=_forget_parent)


def process_group_of(group: Group | None) -> dist.ProcessGroup | None:
    """Return the process group of a mesh of one dimension; of anything else, itself.

    Raises:
        ValueError: the mesh has several dimensions, or this process isn't in it.
    """
    if not isinstance(group, DeviceMesh):
        return group
    if group.ndim != 1:
        name = (group.mesh_dim_names or ("name",))[-1]
        raise ValueError(f"the mesh has {group.ndim} dimensions; pass one of them, such as mesh[{name!r}]")
    if group.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} isn't in this mesh. Make the call on the mesh's ranks only")
    return group.get_group()


def get_or_create_state(group: Group | None, request: Request) -> GroupState:
    """Return the group's state; create it, with `request`, if there is none.

    Raises:
        TypeError: `group` isn't a process group.
        ValueError: this process isn't in the group, or torch.distributed doesn't know the group.
    """
    group = process_group_of(group)
    member: dist.ProcessGroup | None = None
    name = ""
    if dist.is_available() and dist.is_initialized():
        # Ranks outside a new group get a placeholder from torch, not a process group.
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
            raise ValueError(f"rank {dist.get_rank()} isn't in this group. Call get_backend on the group's ranks only")
        member = dist.group.WORLD if group is None else group
        if not isinstance(member, dist.ProcessGroup):
            raise TypeError(f"group={group!r}: expected a torch.distributed process group")
        if member is not None and _inherited_world is dist.group.WORLD:
            raise ValueError(
                "this process inherited its process groups by a fork, and can't use their connections. Call "
                "get_backend in the parent, or start this process with the method 'spawn'"
            )
        if not is_alive(member):
            raise ValueError(_describe_unknown(member))
        name = member.group_name
        member = plain_group(member)
    elif isinstance(group, dist.ProcessGroup):
        raise ValueError(_describe_unknown(group))
    elif group is not None:
        raise TypeError(
            f"group={group!r}: expected a torch.distributed process group, and torch.distributed isn't initialised"
        )
    remove_destroyed()
    return _get_or_create(name, member, request)


def _describe_unknown(group: dist.ProcessGroup) -> str:
    """Return why torch.distributed doesn't know a process group, and what to do."""
    remedy = "Create it with torch.distributed.init_process_group or new_group"
    name = ""
    with contextlib.suppress(RuntimeError):  # it never got one
        name = group.group_name
    if not name:
        return (
            "this process group was made by hand over a store, so torch.distributed knows neither its ranks nor its "
            f"store. {remedy}"
        )
    return (
        f"torch.distributed doesn't know the process group {name!r}: it was destroyed, this process isn't in it, or it "
        f"was made by hand. {remedy}"
    )


def _get_or_create(name: str, group: dist.ProcessGroup | None, request: Request) -> GroupState:
    """Return the state under `name`; create it if there is none."""
    with _lock:
        if name not in _states:
            _states[name] = GroupState(name, group, request)
        return _states[name]


def is_current(state: GroupState) -> bool:
    """Return whether this is still the group's state: another thread may have closed the group meanwhile."""
    with _lock:
        return _states.get(state.name) is state


def all_states() -> list[GroupState]:
    """Return the states of all groups, in the order of their creation."""
    with _lock:
        return list(_states.values())


def remove(state: GroupState) -> None:
    """Forget the group, without closing its handle."""
    if state.backend is not None:
        operators.unregister(state.backend)
    with _lock:
        if _states.get(state.name) is state:
            del _states[state.name]


def remove_destroyed() -> None:
    """Close and forget groups that were destroyed without `comm.close`."""
    for state in all_states():
        if state.group is not None and not is_alive(state.group):
            remove(state)
            state.close_without_peers()


def change_all(states: Sequence[GroupState], change: Callable[[GroupState], None]) -> None:
    """Change every group, even after one failed: the ranks of the other groups wait for this rank.

    Args:
        states: the groups.
        change: called for each group, with its lock held.

    Raises:
        CommError: the first failure, after all groups had their turn.
    """
    failures = [failure for state in states if (failure := _try_to_change(state, change)) is not None]
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # an error's traceback holds this frame: a reference cycle would keep tensors alive


def _try_to_change(state: GroupState, change: Callable[[GroupState], None]) -> CommError | None:
    """Change a group; return its error instead of raising it."""
    try:
        with state.lock:
            change(state)
    except CommError as error:
        return error
    return None


def plain_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the plain group under a group of the backend "comm", which core works with; any other group itself."""
    plain: dist.ProcessGroup | None = getattr(group, "plain", group)
    return plain


def is_alive(group: dist.ProcessGroup) -> bool:
    """Return whether torch still knows the group, with this process in it."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


@contextlib.contextmanager
def translate_stage_errors(state: GroupState) -> Iterator[None]:
    """Translate the errors of a group's stages into public errors that name the group.

    Raises:
        CommTimeoutError: ranks didn't arrive in time.
        NegotiationError: a rank failed.
    """
    try:
        yield
    except StageTimeoutError as error:
        raise CommTimeoutError(f"{state.title}: {error}", error.ranks) from error
    except StageAbortedError as error:
        raise NegotiationError(f"{state.title}: {error}") from error


def _format_ranks(ranks: Sequence[int]) -> str:
    """Format ranks for messages: "0-3", "1,3"."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
