"""The process groups of this process that have a handle: negotiated once, cached, closed in order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from comm_core._control.deadline import describe
from comm_core._control.guard import refuse_capture
from comm_core._control.stage import Stage
from comm_core._control.store import Control, store_of
from comm_core._group.capture import Seat, any_open, entered, joined
from comm_core._group.connect import in_worker
from comm_core._group.handles import Entry, find, forget, found, live, lives, seen, sweep, told
from comm_core._group.negotiation import Agreed, Request, agree, gather_local
from comm_core._group.prepare import checked, first_step, prepare
from comm_core._handle import fallback, operators
from comm_core._handle.backend import Backend
from comm_core._handle.serving import Serving
from comm_core._plan import decide
from comm_core._probe.rank import probe_rank
from comm_core.context import Shapes
from comm_core.errors import BackendUnavailableError, CaptureError, CommError
from comm_core.topology import Topology

__all__ = ["capture", "close", "get_backend", "pre_capture_init"]

_log = logging.getLogger("comm_core")


def get_backend(
    group: dist.ProcessGroup | None = None,
    *,
    backends: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> Backend:
    """Return the all-reduce handle of a process group; the first call negotiates it.

    Collective the first time: every rank of the group calls it, with the same arguments, and gets the same plan. Later
    calls look it up. Ranks that share several groups call it for these in the same order, as with
    `torch.distributed.new_group`.

    Args:
        group: a process group of torch.distributed; None is the world. Without an initialised process group, and in a
            group of one, the sum is a copy.
        backends: names of backends: no others are tried, and one of them that can't serve this group raises. Sizes and
            dtypes outside their ranges still fall back to torch.distributed. None: all installed backends, within
            `COMM_CORE_BACKENDS` and `COMM_CORE_DISABLE`.
        timeout_s: how long each exchange between the ranks, and each backend's `connect`, may take, in seconds; None:
            `COMM_CORE_CONTROL_TIMEOUT_S` and `COMM_CORE_CONNECT_TIMEOUT_S`.

    Raises:
        TypeError, ValueError: this process isn't in the group, the group was destroyed or has a handle with other
            arguments, or an argument is invalid.
        CaptureError: the current stream is capturing a graph; call it before.
        BackendUnavailableError: a backend named in `backends` can't serve; on all ranks.
        NegotiationError: the ranks' settings differ, or one can't negotiate; on all ranks.
        CommTimeoutError: a rank didn't call in time; on all ranks that did, and on the others when they call.
    """
    if backends is not None and (isinstance(backends, str) or not backends):
        raise ValueError(f"backends={backends!r}: a sequence of one or more names is needed")
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise ValueError(f"timeout_s={timeout_s!r}: seconds above 0 are needed")
    request = Request(None if backends is None else tuple(backends), timeout_s)
    while True:
        entry = _entry(group, request)
        with entry.lock:
            # Another thread may have closed the group, or failed to get its handle, before this one had the lock.
            if found(entry):
                return _backend(entry, request)


def _backend(entry: Entry, request: Request) -> Backend:
    """The entry's handle; negotiated where there is none."""
    if entry.backend is None:
        try:
            member = entry.group
            alone = member is None or dist.get_world_size(member) == 1
            backend = entry.serve(_alone(entry) if member is None or alone else _negotiate(entry, member))
        except BaseException:
            forget(entry)
            raise
    elif entry.request != request:
        raise ValueError(
            f"{entry.title} has a handle with {entry.request}, and one with {request} was asked for. Call "
            "comm.close(group) on all its ranks before"
        )
    else:
        backend = entry.backend
    # Again, too: the world's handle stands where that of this process alone stood, and goes before it.
    world = entry.group is not None and entry.group is dist.group.WORLD
    operators.enlist((entry.name, "") if world else (entry.name,), backend)
    return backend


def close(group: dist.ProcessGroup | None = None) -> None:
    """Free the resources of a group's handle: buffers, threads, keys in the store.

    Collective; call it before the process group is destroyed. It waits for the device and for the peers, so that no
    memory is freed that a peer may still read. A peer that doesn't call in time is named in a warning, and everything
    is freed all the same. If any rank has already timed out on a peer, `close()` doesn't wait; a backend may then keep
    memory that its peers' kernels may still write to, until the process ends.

    Afterwards the handle's calls raise, and `get_backend` negotiates again. For a group without a handle, also in a
    second call, it does nothing. A group that was destroyed before is closed without waiting.

    Args:
        group: the group; None: every group that has a handle, in the order in which they got it.

    Raises:
        CaptureError: inside `comm.capture()`, or while a stream captures; nothing is closed.
    """
    _refuse_in_capture("comm.close")
    for entry in live():
        if group is None or entry.group is group:
            with entry.lock:
                _close(entry)


def pre_capture_init(*, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Prepare every group's backends for captures of calls up to a shape: build, allocate, exchange.

    Collective over all ranks of all groups that have a handle, group by group in the order in which they got it. Ranges
    that need preparation are served from then on, if they pass the admission test. A backend that fails on one rank is
    dropped on all ranks of that group, and the next candidate serves; so it does for larger calls than the prepared
    shapes. Call it again for other or larger shapes; a shape that is prepared already costs one exchange.

    Args:
        max_tokens: the most rows of `[num_tokens, hidden_size]`, at least 1.
        hidden_size: elements a row, at least 1.
        dtype: of the tensors.

    Raises:
        TypeError, ValueError: an argument is invalid; before anything is sent.
        CaptureError: inside `comm.capture()`, or while a stream captures; before anything is sent.
        NegotiationError: the ranks gave different arguments, or one failed; alike on all ranks of that group. The other
            groups are prepared all the same.
        BackendUnavailableError: a backend that `get_backend(backends=...)` names was dropped; likewise.
        CommTimeoutError: a rank didn't call in time.
    """
    sweep()
    for entry in live():
        entry.preparations += 1
    shapes = checked(max_tokens, hidden_size, dtype)
    _refuse_in_capture("comm.pre_capture_init")
    # Whatever becomes of one group: ranks of the next ones wait there for this one.
    _raise_first([_failure(entry, shapes) for entry in live()])


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """The context in which CUDA graphs are captured: the sessions of all groups that have a handle are entered.

    ```python
    with comm.capture():
        with torch.cuda.graph(graph):
            y = model(x)
    graph.replay()
    ```

    Inside it, calls on a stream that captures take the routes of graphs, others the eager ones. At its end, sessions
    that registered what graphs read exchange it with their peers: Collective, for groups that captured such calls, and
    only then may a graph be replayed. A `comm.capture()` inside another one is part of that, whatever thread it is in.

    Raises:
        CaptureError: a stream captures already; a session couldn't be entered or left, on this rank or another; another
            thread's is still open, where that raises too: graphs captured inside must not be replayed, and the next
            capture works.
        CommTimeoutError: a peer that captured nothing, or hangs, didn't come to the end.
    """
    with joined() as outermost:
        if outermost is None:
            yield
            return
        sweep()
        entries = live()
        with entered([seat for entry in entries for seat in _seats(entry)]):
            serving = [entry.serving for entry in entries if entry.serving is not None]
            try:
                for each in serving:
                    each.use_graph_routes(True)
                with outermost.opened():
                    yield
            finally:
                for each in serving:
                    each.use_graph_routes(False)


def _seats(entry: Entry) -> Iterator[Seat]:
    """The sessions of a group that a capture enters, also those that this rank has lost: its peers may not have."""
    serving, control, agreed = entry.serving, entry.control, entry.agreed
    if serving is not None and control is not None and agreed is not None:
        for session in agreed.sessions.values():
            if session.plugin.has("capture_ctx"):
                yield Seat(entry.title, serving, control, session)


def _failure(entry: Entry, shapes: Shapes) -> CommError | None:
    """Prepare a group; why that failed, if it did."""
    try:
        with entry.lock:
            _prepare(entry, shapes)
    except CommError as error:
        return error
    except Exception as error:  # noqa: BLE001 - raised once the other groups had their turn
        failure = CommError(f"{entry.title}: {describe(error)}")
        failure.__cause__ = error
        return failure
    return None


def _raise_first(failures: list[CommError | None]) -> None:
    """Raise the first failure there is; keeps none alive by its own frame."""
    failure = next((failure for failure in failures if failure is not None), None)
    failures.clear()
    try:
        if failure is not None:
            raise failure
    finally:
        del failure


def _prepare(entry: Entry, shapes: Shapes) -> None:
    """Prepare a group, if it has a handle."""
    agreed, serving = entry.agreed, entry.serving
    if serving is None:
        return
    if agreed is None:
        serving.warm_up(shapes)
        return
    with told(entry):
        if serving.failure is not None:
            with Stage(agreed.member.control, first_step(entry.preparations)) as stage:
                raise stage.abort(serving.failure)
        planned = prepare(agreed, shapes, entry.preparations)
    if planned is agreed:
        return
    # Until the fallback was seen to work, the next call begins anew.
    entry.hold(dataclasses.replace(planned, prepared=agreed.prepared))
    serving.adopt(planned.decision, planned.sessions)
    try:
        warm_up = functools.partial(serving.warm_up, shapes)
        in_worker(warm_up, planned.member, "torch.distributed's first call")
    except Exception as error:
        raise CommError(f"{entry.title}: the fallback can't be used: {describe(error)}") from error
    entry.hold(planned)
    _tell(entry, agreed, planned)


def _tell(entry: Entry, before: Agreed, after: Agreed) -> None:
    """Log what a preparation has cost the group; raise, on all ranks, where it is a backend that the caller named."""
    lost = [
        candidate
        for candidate in after.decision.candidates
        if candidate.verdict == "failed" and candidate not in before.decision.candidates
    ]
    for candidate in lost:
        where = "" if candidate.rank is None else f"{after.member.control.label(candidate.rank)}: "
        text = f"backend {candidate.name!r} can't serve {entry.title} any more: {where}{candidate.reason}"
        if candidate.name in (entry.request.backends or ()):
            raise BackendUnavailableError(f"{text}. get_backend(backends=...) names it")
        if after.member.control.rank == 0:
            _log.warning("%s. Falling back", text)


def _refuse_in_capture(what: str) -> None:
    if any_open():
        raise CaptureError(f"{what} can't be called inside comm.capture(). Call it before, or after")
    refuse_capture(f"{what} can't wait for other ranks", "Call it before the capture, or after")


def _entry(group: dist.ProcessGroup | None, request: Request) -> Entry:
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
        if not lives(member):
            raise ValueError("this process group was destroyed, or isn't this process's own")
        name = member.group_name
    elif group is not None:
        raise ValueError("this process group was destroyed: torch.distributed isn't initialised")
    sweep()
    return find(name, member, request)


def _negotiate(entry: Entry, group: dist.ProcessGroup) -> Serving:
    refuse_capture(
        f"the ranks of {entry.title}, which has no handle yet, can't agree on one",
        "Call comm.get_backend(group) before the capture",
    )
    local = gather_local(group, entry.request)
    ranks = tuple(dist.get_process_group_ranks(group))
    control = entry.control = Control(store_of(group), dist.get_rank(group), ranks, local.control_timeout_s)
    control.join(seen.setdefault(entry.name, set()))
    try:
        with told(entry):
            agreed = agree(group, entry.title, control, local)
    except BaseException:
        control.finish()
        raise
    entry.hold(agreed)
    terminal = fallback.Terminal(group, entry.title)
    return Serving(
        agreed.decision,
        agreed.topology,
        entry.title,
        local.device,
        (fallback.Terminal.all_reduce, terminal),
        agreed.sessions,
    )


def _alone(entry: Entry) -> Serving:
    """A handle for a group of one: the sum is a copy, whatever is installed."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    kinds = ("cuda", "cpu") if cuda else ("cpu",)
    rank = dist.get_rank() if entry.group is not None else 0
    topology = Topology.of([probe_rank(rank, device, plugins={}, facts={})], kinds)
    decision = decide.Slate(()).decision(kinds)
    return Serving(decision, topology, entry.title, device, (fallback.copy_of_one, entry.group), {})


def _close(entry: Entry) -> None:
    """Close a group's handle, together with its peers where they can still be reached."""
    forget(entry)
    serving, control, group = entry.serving, entry.control, entry.group
    if serving is None:
        return
    failure = serving.failure
    serving.retire(f"{entry.title}: its handle was closed")
    entry.serving = entry.backend = None
    if control is None or group is None:
        return
    if not lives(group):
        entry.abandon()
        return
    orderly = False
    try:
        with Stage(control, "close") as stage:
            if failure is not None:
                # Whom a call has waited for in vain isn't waited for again, nor do the others wait for that.
                raise stage.abort(failure)
            if "cuda" in serving.topology.device_types:
                torch.cuda.synchronize(serving.device)
            stage.barrier()
        orderly = True
    except Exception as error:  # noqa: BLE001 - what this rank holds is given back whatever became of the others
        _log.warning("%s is closed without all its ranks: %s", entry.title, error)
    finally:
        for session in entry.sessions:
            session.close(orderly=orderly)
    if orderly:
        # Memory that this rank's graphs read may be freed once it returns: by then no peer has it mapped.
        with contextlib.suppress(CommError), Stage(control, "closed") as stage:
            stage.barrier()
    control.finish()
