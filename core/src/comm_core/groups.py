"""The process groups of this process that have a handle: negotiated once, cached, closed in order."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

from comm_core import fallback, negotiate, ops
from comm_core.agreement import Request, agree, gather_local
from comm_core.backend import Backend
from comm_core.control import Control, StageAbortedError, StageTimeoutError, store_of
from comm_core.errors import CaptureError, CommTimeoutError, NegotiationError
from comm_core.establish import Session
from comm_core.probe import probe_rank
from comm_core.topology import Topology

__all__ = ["close", "get_backend"]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class _Entry:
    """A group and what this process has for it.

    It keeps the process group object alive, so that no other can have its address; `_sweep` lets go of those that
    torch destroyed.
    """

    name: str
    group: dist.ProcessGroup | None
    request: Request
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    backend: Backend | None = None
    control: Control | None = None
    sessions: dict[str, Session] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """Names the group for people."""
        if self.group is None:
            return "this process, alone"
        if self.control is None:
            return f"group {self.name!r}"
        return f"group {self.name!r} (ranks {_listed(self.control.global_ranks)})"


_entries: dict[str, _Entry] = {}
_entries_lock = threading.Lock()
# Incarnations of each group's control channel that this process was in, by the group's name; they outlive the entries.
_seen: dict[str, set[str]] = {}


def get_backend(
    group: dist.ProcessGroup | None = None,
    *,
    backends: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> Backend:
    """The all-reduce handle of a process group.

    Collective the first time: every rank of the group calls it, with the same arguments, and gets the same plan.
    Afterwards it is a look-up. Ranks that share several groups call it for these in one order, as with
    `torch.distributed.new_group`.

    Args:
        group: a process group of torch.distributed; None is the world. Without an initialised process group, and in a
            group of one, the sum is a copy.
        backends: names of backends: no others are tried, and one of them that can't serve this group raises. Sizes and
            dtypes beyond their ranges end in torch.distributed all the same. None: whatever is installed, within
            `COMM_CORE_BACKENDS` and `COMM_CORE_DISABLE`.
        timeout_s: how long each exchange between the ranks, and each backend's `connect`, may take, in seconds; None:
            `COMM_CORE_CONTROL_TIMEOUT_S` and `COMM_CORE_CONNECT_TIMEOUT_S`.

    Raises:
        TypeError, ValueError: this process isn't in the group, the group was destroyed, it has a handle with other
            arguments, or an argument can't be right.
        CaptureError: the current stream is capturing a graph; call it before.
        BackendUnavailableError: a backend named in `backends` can't serve; on all ranks.
        NegotiationError: the ranks' settings differ, or one can't negotiate; on all ranks.
        CommTimeoutError: ranks didn't come in time; on all ranks that did, and on the others once they come.
    """
    if backends is not None and (isinstance(backends, str) or not backends):
        raise ValueError(f"backends={backends!r}: a sequence of one or more names is needed")
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s={timeout_s!r}: seconds above 0 are needed")
    request = Request(None if backends is None else tuple(backends), timeout_s)
    entry = _entry(group, request)
    with entry.lock:
        if entry.backend is None:
            try:
                member = entry.group
                if member is None or dist.get_world_size(member) == 1:
                    entry.backend = _alone(entry)
                else:
                    entry.backend = _negotiate(entry, member)
            except BaseException:
                _forget(entry)
                raise
            world = entry.group is not None and entry.group is dist.group.WORLD
            ops.enlist((entry.name, "") if world else (entry.name,), entry.backend)
        elif entry.request != request:
            raise ValueError(
                f"{entry.title} has a handle with {entry.request}, and one with {request} was asked for. Call "
                "comm.close(group) on all its ranks before"
            )
        return entry.backend


def close(group: dist.ProcessGroup | None = None) -> None:
    """Give back what a group's handle holds: buffers, threads, keys in the store.

    Collective, to be called before the process group is destroyed: waits for the device and for the peers, so that no
    memory is freed that one of them may read. A peer that doesn't come in time is named in a warning, and everything is
    given back all the same. Afterwards the handle's calls raise, and `get_backend` negotiates anew. A group that has no
    handle is left as it is, so a second call does nothing. A group that was destroyed before is closed without waiting.

    Args:
        group: None: every group, in the order in which they got their handles.
    """
    with _entries_lock:
        entries = [entry for entry in _entries.values() if group is None or entry.group is group]
    for entry in entries:
        with entry.lock:
            _close(entry)


def _entry(group: dist.ProcessGroup | None, request: Request) -> _Entry:
    """The group's entry; a new one, with `request`, where there is none."""
    member: dist.ProcessGroup | None = None
    name = ""
    if dist.is_available() and dist.is_initialized():
        # What torch hands to ranks outside a new group is no process group at all.
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
            raise ValueError(f"rank {dist.get_rank()} isn't in this group: skip the call there")
        member = dist.group.WORLD if group is None else group
        if not isinstance(member, dist.ProcessGroup):
            raise TypeError(f"a torch.distributed process group is needed, not {group!r}")
        if not _lives(member):
            raise ValueError("this process group was destroyed, or isn't this process's own")
        name = member.group_name
    elif group is not None:
        raise ValueError("this process group was destroyed: torch.distributed isn't initialised")
    _sweep()
    with _entries_lock:
        if name not in _entries:
            _entries[name] = _Entry(name, member, request)
        return _entries[name]


def _negotiate(entry: _Entry, group: dist.ProcessGroup) -> Backend:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(f"{entry.title} has no handle yet and a graph is being captured: call get_backend before")
    local = gather_local(group, entry.request)
    ranks = tuple(dist.get_process_group_ranks(group))
    control = entry.control = Control(store_of(group), dist.get_rank(group), ranks, local.control_timeout_s)
    control.join(_seen.setdefault(entry.name, set()))
    try:
        agreed = agree(group, entry.title, control, local)
    except StageTimeoutError as error:
        control.finish()
        raise CommTimeoutError(f"{entry.title}: {error}", error.ranks) from error
    except StageAbortedError as error:
        control.finish()
        raise NegotiationError(f"{entry.title}: {error}") from error
    except BaseException:
        control.finish()
        raise
    entry.sessions = agreed.sessions
    terminal = (fallback.torch_distributed, group)
    return Backend(agreed.decision, agreed.topology, entry.title, local.device, terminal, agreed.sessions, entry.name)


def _alone(entry: _Entry) -> Backend:
    """A handle for a group of one: the sum is a copy, whatever is installed."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    kinds = ("cuda", "cpu") if cuda else ("cpu",)
    rank = dist.get_rank() if entry.group is not None else 0
    topology = Topology.of([probe_rank(rank, device, plugins={}, facts={})], kinds)
    decision = negotiate.Slate(()).decision(kinds)
    return Backend(decision, topology, entry.title, device, (fallback.copy_of_one, entry.group), {}, entry.name)


def _close(entry: _Entry) -> None:
    """Close a group's handle, together with its peers where they can still be reached."""
    _forget(entry)
    backend, control, group = entry.backend, entry.control, entry.group
    if backend is None:
        return
    backend.retire(f"{entry.title}: its handle was closed")
    entry.backend = None
    if control is None or group is None:
        return
    if not _lives(group):
        _abandon(entry)
        return
    orderly = True
    try:
        with control.stage("close") as stage:
            if "cuda" in backend.topology.device_types:
                torch.cuda.synchronize(backend.device)
            stage.barrier()
    except Exception as error:  # noqa: BLE001 - what this rank holds is given back whatever became of the others
        orderly = False
        _log.warning("%s is closed without all its ranks: %s", entry.title, error)
    for session in entry.sessions.values():
        session.close(orderly)
    control.finish()


def _sweep() -> None:
    """Let go of groups that were destroyed without `close`."""
    with _entries_lock:
        gone = [entry for entry in _entries.values() if entry.group is not None and not _lives(entry.group)]
    for entry in gone:
        _forget(entry)
        _abandon(entry)


def _abandon(entry: _Entry) -> None:
    """Close a group that torch destroyed: its peers can't be reached any more."""
    if entry.sessions:
        _log.warning("%s was destroyed before comm.close(group): closing without its peers", entry.title)
    if entry.backend is not None:
        entry.backend.retire(f"{entry.title} was destroyed")
    for session in entry.sessions.values():
        session.close(orderly=False)


def _forget(entry: _Entry) -> None:
    if entry.backend is not None:
        ops.strike(entry.backend)
    with _entries_lock:
        if _entries.get(entry.name) is entry:
            del _entries[entry.name]


def _lives(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows the group and this process is in it."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


def _listed(ranks: Sequence[int]) -> str:
    """Ranks for people: "0-3", "1,3"."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
