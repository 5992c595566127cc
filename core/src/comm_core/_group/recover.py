"""`comm.recover`: drop the backends that failed on any rank, and go on with the others and the same handle.

Like `comm.suspend` it has two parts. First every rank finishes its work and reports whether its handle has stopped, and
why; a failure up to here changes nothing. Then all ranks let go of their sessions and connect again, in a new
incarnation of the group; a failure here stops the handle for good.

Every session is replaced, also of backends that didn't fail: a rank whose handle stopped has let go of all of them by
the hook `abort`, and the ranks' calls of them may differ. `torch.distributed` can't be replaced, and needn't be: once
every rank's device has done its work, no call of it is under way, and all ranks have made the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence

import torch

from comm_core._control.deadline import describe, text_of
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError, end_incarnation
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._group.prepare_groups import report_dropped
from comm_core._group.reconnect import change_incarnation, reconnect, release_sessions
from comm_core._group.states import GroupState, change_all, translate_stage_errors
from comm_core._group.step import run_in_worker
from comm_core._plan.faults import Fault, failed_backends, fallback_failure
from comm_core.errors import BackendUnavailableError, CommError, CommTimeoutError

__all__ = ["recover_groups"]

_CLOSE = "Close it on all ranks and get a new handle"
_NEW_GROUP = (
    "If a rank is gone for good, the others go on without it: comm.close(group), then comm.get_backend of a new group, "
    "made by torch.distributed.new_group(ranks, use_local_synchronization=True)"
)


def recover_groups(states: Sequence[GroupState], timeout_s: float | None) -> None:
    """Recover every group, even after one failed: the ranks of the other groups wait for this rank.

    Args:
        states: the groups.
        timeout_s: the deadline of each exchange and each `connect`, in seconds; None: as in `get_backend`.

    Raises:
        CommError: the first failure, after all groups had their turn.
    """
    change_all(states, functools.partial(_recover_group, timeout_s=timeout_s))


def _recover_group(state: GroupState, timeout_s: float | None) -> None:
    if state.serving is None:
        return
    if state.negotiated is None:
        _recover_alone(state)
        return
    faults = _meet(state, state.negotiated, timeout_s)
    if any(faults):
        failed = failed_backends(faults)
        _check_replaceable(state, state.negotiated, faults, failed)
        _replace_sessions(state, state.negotiated, failed, timeout_s)


def _recover_alone(state: GroupState) -> None:
    """Recover a group without peers to negotiate with, which torch.distributed or a copy serves."""
    serving = state.serving
    if serving is None or serving.refusal is None:
        return
    if serving.fault is None:
        raise CommError(serving.refusal)
    serving.recover(serving.decision, {}, None)


def _meet(state: GroupState, negotiated: NegotiatedGroup, timeout_s: float | None) -> list[Fault | None]:
    """Wait until every rank has finished its work; return the ranks' reports of why their handles have stopped.

    Raises:
        CommTimeoutError: a rank didn't come in time.
        CommError: a rank failed, or can't recover.
    """
    control = negotiated.member.control
    limit_s = control.timeout_s if timeout_s is None else timeout_s
    what = f"{state.title} can't recover"
    # Skip the calls that ended without this rank, by its peers' time-out.
    while isinstance(Stage(control, _stage_name(state)).peek(), StageTimeoutError):
        state.recoveries += 1
    name = _stage_name(state)
    state.recoveries += 1
    try:
        with Stage(control, name, limit_s) as stage:
            try:
                fault = _finish_work(state, negotiated, limit_s / 2)
            except Exception as error:  # the device, or a rank that can't recover: all ranks raise it
                reason = text_of(error) if isinstance(error, (CommError, TimeoutError)) else describe(error)
                raise stage.abort(reason) from error
            reports = stage.all_gather(None if fault is None else fault.to_json())
        return negotiated.member.read_faults(reports)
    except StageTimeoutError as error:
        raise CommTimeoutError(f"{what}: {error.reason}. Nothing has changed. {_NEW_GROUP}", error.ranks) from error
    except StageAbortedError as error:
        where = "" if error.rank is None else f"{control.label(error.rank)}: "
        if error.final and state.serving is not None:
            state.serving.retire(f"{what}: {where}{error.reason}. {_CLOSE}")
            raise CommError(state.serving.failure) from error
        raise CommError(f"{what}: {where}{error.reason}. Nothing has changed") from error
    except BaseException as error:  # an interrupt, or the store is gone: this rank leaves the others
        end_incarnation(control, error)
        if state.serving is not None:
            state.serving.retire(f"comm.recover of {state.title} ended early: {describe(error)}. {_CLOSE}")
        raise


def _stage_name(state: GroupState) -> str:
    return f"recover {state.recoveries}"


def _finish_work(state: GroupState, negotiated: NegotiatedGroup, timeout_s: float) -> Fault | None:
    """Wait for the device, let the kernels' errors stop the handle, and return why it has stopped, None if it hasn't.

    Raises:
        CommError: this rank can't recover: a thread is still in a call, the group is suspended, or its handle stopped
            for good.
        TimeoutError: the device hasn't finished in time.
    """
    serving, backend = state.serving, state.backend
    if serving is None or backend is None:
        return None
    if backend._idle is backend._in_use:  # noqa: SLF001 - no property for callers
        raise CommError("a thread is still in a call of the handle")
    serving.check_peers(0.0)  # first: a handle that stops ends its kernels' waits
    if serving.refusal is not None and serving.fault is None:
        raise CommError(serving.refusal)
    if "cuda" in negotiated.topology.device_types:
        synchronize = functools.partial(torch.cuda.synchronize, serving.device)
        run_in_worker(synchronize, negotiated.member, "the device's work", timeout_s=timeout_s, synchronize=False)
    if serving.failure is None:
        with contextlib.suppress(Exception):  # it stops the handle, which then has the fault
            backend.check()
    return serving.fault


def _check_replaceable(
    state: GroupState,
    negotiated: NegotiatedGroup,
    faults: Sequence[Fault | None],
    failed: Mapping[str, tuple[str, int]],
) -> None:
    """Check that others can take the place of what failed; else raise, on all ranks alike, with nothing changed.

    Raises:
        CommError: torch.distributed failed, which serves what no other backend does.
        BackendUnavailableError: the caller named a backend that failed.
    """
    control = negotiated.member.control
    fallback = fallback_failure(faults)
    if fallback is not None:
        reason, rank = fallback
        raise CommError(
            f"{state.title} can't recover: torch.distributed, the fallback, failed on {control.label(rank)} in "
            f"{reason}. Destroy the process group, and make a new one"
        )
    for name in state.request.backends or ():
        if name in failed:
            reason, rank = failed[name]
            raise BackendUnavailableError(
                f"{state.title} can't recover: backend {name!r} failed on {control.label(rank)} in {reason}. "
                "get_backend(backends=...) names it, so no other takes its place. Close the group, and leave it out"
            )


def _replace_sessions(
    state: GroupState, negotiated: NegotiatedGroup, failed: Mapping[str, tuple[str, int]], timeout_s: float | None
) -> None:
    """Replace the group's sessions, and serve by the new plan. Collective.

    Raises:
        NegotiationError: a rank left by an exception.
        CommTimeoutError: a rank vanished.
        BackendUnavailableError: the caller named a backend that failed to connect again; the handle goes on without it.
    """
    old, serving, group = negotiated.member.control, state.serving, state.group
    if serving is None or group is None:
        return
    serving.retire(f"{state.title} is recovering")
    control = old
    try:
        with translate_stage_errors(state):
            replaced = release_sessions(state, negotiated)
            control = change_incarnation(state, group, old, timeout_s)
            planned = reconnect(state, negotiated, control, failed, timeout_s)
    except BaseException as error:
        if not isinstance(error.__cause__, StageAbortedError):  # such an error is on all ranks already
            end_incarnation(control, error)
        serving.retire(f"comm.recover of {state.title} failed: {describe(error)}. {_CLOSE}")
        if isinstance(error, CommTimeoutError):
            raise CommTimeoutError(f"{error}. {_NEW_GROUP}", error.ranks) from error
        raise
    control.timeout_s = old.timeout_s
    state.adopt(planned)
    serving.recover(planned.decision, planned.sessions, control, replaced)
    report_dropped(state, negotiated, planned)
