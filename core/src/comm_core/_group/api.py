"""The public functions: get a group's handle, prepare it, capture its calls, suspend it, recover it, close it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from comm_core._group.capture import (
    WaitInterruptedError,
    capture_sessions,
    join_or_open,
    raises_interrupts,
    refuse_in_capture,
)
from comm_core._group.close import close_group
from comm_core._group.create import create_serving
from comm_core._group.local_inputs import Request
from comm_core._group.prepare_groups import check_shapes, prepare_groups
from comm_core._group.recover import recover_groups
from comm_core._group.states import (
    Group,
    GroupState,
    all_states,
    get_or_create_state,
    is_current,
    plain_group,
    process_group_of,
    remove,
    remove_destroyed,
)
from comm_core._group.suspend import change_groups
from comm_core._handle.backend import Backend

if TYPE_CHECKING:
    import torch

__all__ = ["capture", "close", "get_backend", "pre_capture_init", "recover", "resume", "suspend"]


@raises_interrupts
def get_backend(
    group: Group | None = None,
    *,
    backends: Sequence[str] | None = None,
    timeout_s: float | None = None,
    deterministic: bool | None = None,
    wire: str | None = None,
) -> Backend:
    """Return the all-reduce handle of a process group; the first call negotiates it.

    The first call is Collective: every rank of the group makes it, with the same arguments, and gets the same plan.
    Later calls return the same handle. Ranks that share several groups make the first calls in the same order, as with
    `torch.distributed.new_group`.

    Args:
        group: a torch.distributed process group, or a `DeviceMesh` of one dimension; None: the world. In a group of one
            rank, and without an initialised process group, the sum is a copy. torch.distributed alone serves a group of
            torch's backend "fake".
        backends: names of backends. Only these are tried, and the call raises if one of them can't serve this group.
            Sizes and dtypes outside their ranges still fall back to torch.distributed. None: all installed backends
            that `COMM_CORE_BACKENDS` and `COMM_CORE_DISABLE` allow.
        timeout_s: the deadline of each exchange between the ranks, and of each backend's `connect`, in seconds; None:
            `COMM_CORE_CONTROL_TIMEOUT_S` and `COMM_CORE_CONNECT_TIMEOUT_S`.
        deterministic: True: each result's bits depend on the inputs alone, not on how many elements or tokens travel
            together, on eager or graph, on the backend or on the run. Only backends whose `Available.numerics` is
            "rank_order_fp32" serve; a message above a backend's largest goes to it in pieces, and instead of
            torch.distributed's sum, floats are gathered and summed in rank order. None: `COMM_CORE_DETERMINISTIC`.
        wire: "fp8": plain sums may travel quantised to FP8 (e4m3), where a backend has such ranges, which large
            messages of half precision then take. All ranks get the same bits. With x_r rank r's element and m_r the
            largest magnitude of the at most 128 elements in its chunk, an error is at most
            0.14 sum_r |x_r| + 2^-15 sum_r m_r. Everything else is served as usual. Excludes `deterministic`.
            "": no such wire; None: `COMM_CORE_WIRE`.

    Raises:
        TypeError, ValueError: an argument is invalid, this process isn't in the group, torch.distributed doesn't know
            the group, or it has a handle with other arguments.
        CaptureError: the current stream is capturing a graph; call `get_backend` before the capture.
        BackendUnavailableError: a backend named in `backends` can't serve; on all ranks.
        NegotiationError: the ranks' settings differ, ranks of one host use the same GPU, the group has no usable
            backend or store, or a rank can't negotiate or left by an exception; on all ranks, but the one that left
            raises its own.
        CommTimeoutError: a rank didn't call in time, or vanished; on all ranks, on a late one as soon as it calls.
    """
    request = Request.of(backends, timeout_s, deterministic, wire)
    while True:
        state = get_or_create_state(group, request)
        with state.lock:
            # Before this thread got the lock, another may have closed the group or failed to create its handle.
            if is_current(state):
                return _get_or_create_backend(state, request)


def _get_or_create_backend(state: GroupState, request: Request) -> Backend:
    """Return the group's handle; create it if there is none."""
    if state.backend is None:
        try:
            backend = state.create_backend(create_serving(state))
        except BaseException:
            remove(state)
            raise
    elif state.request != request:
        raise ValueError(
            f"{state.title} has a handle with {state.request}; this call asks for one with {request}. Call "
            "comm.close(group) on all its ranks first"
        )
    else:
        backend = state.backend
    # An existing handle, too: the name "" means the world or, as long as there is none, this process alone.
    state.register(backend)
    return backend


@raises_interrupts
def close(group: Group | None = None) -> None:
    """Free the resources of a group's handle: buffers, threads, keys in the store.

    Collective; call it before the process group is destroyed. It waits for the device and the peers before it frees
    memory that a peer may still read. If a peer doesn't call in time, a warning names it and everything is freed all
    the same. If any rank has already timed out on a peer, `close()` doesn't wait; a backend may then keep memory that
    its peers' kernels may still write to, until the process ends.

    Afterwards the handle's calls raise, and `get_backend` negotiates again. For a group without a handle, for example
    in a second call, it does nothing. If the process group was destroyed before, `close()` doesn't wait.

    Args:
        group: the group; None: every group that has a handle, in the order in which they got it.

    Raises:
        CaptureError: inside `comm.capture()`, or while a stream captures; nothing is closed.
        KeyboardInterrupt: it came meanwhile, or a plugin raised it; after the group is closed.
    """
    refuse_in_capture("comm.close")
    for state in _states_of(group):
        with state.lock:
            close_group(state)


@raises_interrupts
def pre_capture_init(*, max_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Prepare every group's backends for captures of calls up to a shape: build, allocate, exchange.

    Collective over all ranks of all groups that have a handle, group by group in the order in which they got it. Ranges
    that need preparation are served from then on, if they pass the admission test. A backend that fails on one rank is
    dropped on all ranks of that group, and the next candidate serves. Calls larger than the prepared shapes also go to
    the next candidate. Call it again for other or larger shapes; a shape that is already prepared costs one exchange.

    Args:
        max_tokens: the largest `num_tokens` of `[num_tokens, hidden_size]`, at least 1.
        hidden_size: the row length in elements, at least 1.
        dtype: the tensors' dtype.

    Raises:
        TypeError, ValueError: an argument is invalid; before anything is sent.
        CaptureError: inside `comm.capture()`, or while a stream captures; before anything is sent.
        NegotiationError: the ranks passed different arguments, or a rank left by an exception; on all ranks of that
            group, and in the second case its handle refuses further calls. The other groups are still prepared.
        BackendUnavailableError: a backend that `get_backend(backends=...)` names was dropped; on all ranks of that
            group. The other groups are still prepared.
        CommTimeoutError: a rank didn't call in time; or it vanished, and then the group's handle refuses further calls.
        CommError: a group is suspended; on all its ranks, before anything is sent to them. The other groups are still
            prepared.
    """
    remove_destroyed()
    for state in all_states():
        # In a suspended group nothing is sent, so its ranks need no number: one of them may have called alone.
        if state.serving is None or not state.serving.suspended:
            state.preparations += 1
    shapes = check_shapes(max_tokens, hidden_size, dtype)
    refuse_in_capture("comm.pre_capture_init")
    prepare_groups(all_states(), shapes)


@raises_interrupts
def suspend(group: Group | None = None) -> None:
    """Give the device memory of a group's backends back, until `resume`.

    Collective; every rank of the group calls it, with no call or replay of the group left to queue. It waits for the
    device and the peers, then runs the backends' hook `suspend`. Backends without the hook keep their memory, as does
    torch.distributed. Until `resume` every call of the handle raises, and graphs with its calls must not be replayed.
    For a suspended group, or one without a handle, it does nothing.

    Args:
        group: the group; None: every group that has a handle, in the order in which they got it.

    Raises:
        CaptureError: inside `comm.capture()`, or while a stream captures; before anything is sent.
        CommTimeoutError: a rank didn't call in time, and the group goes on as before. Or a rank's hook missed
            `COMM_CORE_CONNECT_TIMEOUT_S`, or the rank vanished meanwhile: then the group's handle refuses further
            calls, and `comm.close(group)` frees it.
        CommError: a rank's handle had stopped before, and the others go on as before. Or a backend's hook failed, or a
            rank left by an exception: then the group's handle refuses further calls. Like `CommTimeoutError`, it is
            raised on all ranks of the group, but for one that left; the other groups are still suspended.
    """
    refuse_in_capture("comm.suspend")
    remove_destroyed()
    change_groups(_states_of(group), "suspend")


@raises_interrupts
def resume(group: Group | None = None) -> None:
    """Take the device memory of a suspended group's backends again, at the same addresses.

    Collective; every rank of the group calls it. It runs the backends' hook `resume`. Then the handle serves calls as
    before `suspend`, and graphs captured before can be replayed. For a group that isn't suspended, or has no handle, it
    does nothing.

    Args:
        group: the group; None: every group that has a handle, in the order in which they got it.

    Raises:
        CaptureError: inside `comm.capture()`, or while a stream captures; before anything is sent.
        CommError, CommTimeoutError: as in `suspend`; where there the group goes on as before, it stays suspended here.
            A backend's hook also fails if a rank's device lacks the memory.
    """
    refuse_in_capture("comm.resume")
    remove_destroyed()
    change_groups(_states_of(group), "resume")


@raises_interrupts
def recover(group: Group | None = None, *, timeout_s: float | None = None) -> None:
    """Drop the backends that failed, on all ranks, and serve calls by the others from now on, with the same handle.

    Collective; every rank of the group calls it once a handle has stopped on any of them, with no call or replay of the
    group left to queue. It waits for the device and the peers; then all ranks drop each backend that failed on one of
    them, connect and test the others again, and adopt one plan. `explain()` has the failed backend's reason. If no
    rank's handle has stopped, or for a group without a handle, it changes nothing.

    Graphs that were captured before must not be replayed: `Backend.check` raises after such a replay if the backend
    can tell. Call `pre_capture_init` again, and capture again. Backends in groups of CUDA tensors keep the memory of
    before until the group is closed, since such a graph may still be replayed by mistake.

    Errors are raised on all ranks alike, but a rank that leaves raises its own; the other groups are still recovered.

    Args:
        group: the group; None: every group that has a handle, in the order in which they got it.
        timeout_s: as in `get_backend`, for this call; None: the group's.

    Raises:
        TypeError, ValueError: `timeout_s` is invalid.
        CaptureError: inside `comm.capture()`, or while a stream captures; before anything is sent.
        CommTimeoutError: a rank didn't call in time; nothing has changed, and the call can be made again on all ranks.
            If the rank is gone for good, close the group and make a new one of the others. Or a rank vanished while
            backends connected: then the handle refuses further calls for good.
        BackendUnavailableError: a backend failed that `get_backend(backends=...)` names; nothing has changed. Or one
            failed to connect again: then the handle goes on without it.
        CommError: a rank's device or a thread of it is still busy with earlier calls, torch.distributed itself failed,
            the group is suspended, or its handle can't recover; nothing has changed, and the text names the rank. Or a
            rank left by an exception while backends connected: then the handle refuses further calls for good.
    """
    timeout_s = Request.of(None, timeout_s).timeout_s
    refuse_in_capture("comm.recover")
    remove_destroyed()
    recover_groups(_states_of(group), timeout_s)


def _states_of(group: Group | None) -> list[GroupState]:
    """Return the state of a group, if it has one; of all groups for None."""
    group = process_group_of(group)
    return [state for state in all_states() if group is None or state.group is plain_group(group)]


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Enter the sessions of all groups that have a handle, for the capture of CUDA graphs.

    ```python
    with comm.capture():
        with torch.cuda.graph(graph):
            y = model(x)
    graph.replay()
    ```

    Inside, calls on a capturing stream take the graph routes, other calls the eager routes. At the end, sessions that
    registered captured calls exchange the registered addresses with their peers. This exit is Collective for groups
    that captured such calls; replay a graph only after it. A nested `comm.capture()`, in any thread, joins the outer
    one.

    Raises:
        CaptureError: a stream captures already; a group is suspended; a session couldn't be entered or left, on this
            rank or another; or a nested `comm.capture()` in another thread is still open, and then it raises too.
            Graphs captured inside must not be replayed. The next capture works.
        CommTimeoutError: a peer captured nothing, or hangs, and didn't reach the end in time.
    """
    try:
        with join_or_open() as outermost:
            if outermost is None:
                yield
                return
            remove_destroyed()
            with capture_sessions(all_states(), outermost):
                yield
            return
    except WaitInterruptedError as interrupt:
        error = interrupt.__cause__ or interrupt
    raise error
