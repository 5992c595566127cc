"""The process groups of this process that have a handle: negotiated once, cached, closed in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from comm_core._group.capture import captured, joined, refuse_in_capture
from comm_core._group.close import close_group
from comm_core._group.create import create_serving
from comm_core._group.handles import GroupState, entries, is_current, remove, remove_destroyed, state_of
from comm_core._group.local_inputs import Request
from comm_core._group.prepare_groups import check_shapes, prepare_groups
from comm_core._handle import operators
from comm_core._handle.backend import Backend

__all__ = ["capture", "close", "get_backend", "pre_capture_init"]


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
        state = state_of(group, request)
        with state.lock:
            # Another thread may have closed the group, or failed to get its handle, before this one had the lock.
            if is_current(state):
                return _backend(state, request)


def _backend(state: GroupState, request: Request) -> Backend:
    """The group's handle; a new one where there is none."""
    if state.backend is None:
        try:
            backend = state.serve(create_serving(state))
        except BaseException:
            remove(state)
            raise
    elif state.request != request:
        raise ValueError(
            f"{state.title} has a handle with {state.request}, and one with {request} was asked for. Call "
            "comm.close(group) on all its ranks before"
        )
    else:
        backend = state.backend
    # Again, too: the world's handle stands where that of this process alone stood, and goes before it.
    world = state.group is not None and state.group is dist.group.WORLD
    operators.register((state.name, "") if world else (state.name,), backend)
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
    refuse_in_capture("comm.close")
    for state in entries():
        if group is None or state.group is group:
            with state.lock:
                close_group(state)


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
    remove_destroyed()
    for state in entries():
        state.preparations += 1
    shapes = check_shapes(max_tokens, hidden_size, dtype)
    refuse_in_capture("comm.pre_capture_init")
    prepare_groups(entries(), shapes)


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
        remove_destroyed()
        with captured(entries(), outermost):
            yield
