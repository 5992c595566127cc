"""`comm.suspend` and `comm.resume`: give the memory of groups' sessions back, and take it again.

Each change of a group has two parts. First every rank stops calling, finishes its work and waits for the others; a
failure up to here leaves the group as it was. Then each session's hook runs on all ranks, followed by a vote; after a
failure here sessions may be half suspended, so the handle stops on all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from comm_core._control.deadline import describe, text_of
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError, end_incarnation
from comm_core._group.states import GroupState, change_all
from comm_core._group.step import Step, run_in_worker
from comm_core.errors import CommError, CommTimeoutError

if TYPE_CHECKING:
    from comm_core._group.membership import Membership
    from comm_core._handle.serving import Serving
    from comm_core._handle.session import Session

__all__ = ["change_groups"]

Hook = Literal["suspend", "resume"]

# The hook's consequence for the memory of a group, and the group's state, in texts.
_EFFECT: dict[Hook, str] = {"suspend": "given back", "resume": "taken"}
_STATE: dict[Hook, str] = {"suspend": "suspended", "resume": "resumed"}
_REMEDY = "This handle refuses further calls; close it on all ranks and get a new one"


def change_groups(states: Sequence[GroupState], hook: Hook) -> None:
    """Suspend or resume every group, even after one failed: the ranks of the other groups wait for this rank.

    Raises:
        CommError: the first failure, after all groups had their turn.
    """
    change_all(states, functools.partial(_change_group, hook=hook))


def _change_group(state: GroupState, hook: Hook) -> None:
    serving = state.serving
    if serving is None or (serving.failure is None and serving.suspended is (hook == "suspend")):
        return
    if hook == "suspend" and serving.failure is None:
        serving.suspend()  # first, so that no thread begins another call
    if state.negotiated is not None:
        _change_together(state, serving, state.negotiated.member, hook)
    elif serving.failure is not None:
        raise CommError(serving.failure)
    if hook == "resume":
        serving.resume()


def _change_together(state: GroupState, serving: Serving, member: Membership, hook: Hook) -> None:
    """Run the hook of a group's sessions on all ranks.

    Raises:
        CommError: it failed on some rank; see `suspend`.
    """
    control, begun = member.control, False
    what = f"{state.title} can't be {_STATE[hook]}"
    try:
        stage_name = _meet(state, serving, member, hook)
        begun = True
        for session in [session for session in serving.all_sessions if session.needs(hook)]:
            what = f"backend {session.plugin.name!r} of {state.title} failed in {hook}"
            _run_hook(session, hook, f"{stage_name}, {session.plugin.name}", member)
    except StageAbortedError as error:
        where = "" if isinstance(error, StageTimeoutError) or error.rank is None else f"{control.label(error.rank)}: "
        text = f"{what}: {where}{error.reason}"
        if begun or error.final:
            text = f"{text}. {_REMEDY}"
            serving.retire(text)
        else:
            text = f"{text}. No memory was {_EFFECT[hook]}"
            if hook == "suspend":
                serving.resume()
        if error.is_timeout:
            raise CommTimeoutError(text, getattr(error, "ranks", ())) from error
        raise CommError(text) from error
    except BaseException as error:  # an interrupt, or the store is gone: this rank leaves the others
        end_incarnation(control, error)
        serving.retire(f"comm.{hook} of {state.title} ended early: {describe(error)}. {_REMEDY}")
        raise


def _meet(state: GroupState, serving: Serving, member: Membership, hook: Hook) -> str:
    """Wait until every rank has stopped calling and finished its work; return a prefix of names for later stages.

    Raises:
        StageAbortedError: a rank failed, or didn't call in time.
    """
    control = member.control
    # Skip the calls that ended without this rank, by its peers' time-out.
    while isinstance(Stage(control, _stage_name(state, hook)).peek(), StageTimeoutError):
        state.suspensions += 1
    stage_name = _stage_name(state, hook)
    state.suspensions += 1
    with Stage(control, stage_name) as stage:
        try:
            _finish_work(state, serving, member)
        except Exception as error:  # the plugins' `check` or the device: all ranks raise it
            reason = text_of(error) if isinstance(error, (CommError, TimeoutError)) else describe(error)
            raise stage.abort(reason) from error
        stage.barrier()
    return stage_name


def _stage_name(state: GroupState, hook: Hook) -> str:
    return f"{hook} {state.suspensions}"


def _finish_work(state: GroupState, serving: Serving, member: Membership) -> None:
    """Wait for the device, and raise the errors that its kernels recorded: the memory that holds them may be lost."""
    if state.backend is None:
        return
    state.backend._require_idle()  # noqa: SLF001 - no method for callers
    if "cuda" in serving.topology.device_types:
        synchronize = functools.partial(torch.cuda.synchronize, serving.device)
        # Half: the ranks that wait for this one hear of a hang in time.
        half_s = member.control.timeout_s / 2
        run_in_worker(synchronize, member, "the device's work", timeout_s=half_s, synchronize=False)
    state.backend.check()


def _run_hook(session: Session, hook: Hook, stage_name: str, member: Membership) -> None:
    """Run a session's hook on every rank and vote.

    Raises:
        StageAbortedError: it failed on some rank.
    """
    step = Step(member)
    call = functools.partial(session.plugin.hooks[hook], session.value)
    try:
        with session.channel.open_stage(member.control, stage_name, step.left_s) as stage:
            try:
                step.run(call, f"{hook} of {session.plugin.name}")
                stage.all_gather(None, "vote")
            except StageAbortedError:
                raise
            except Exception as error:  # plugin boundary: its failure aborts the stage on all ranks
                raise step.abort(stage, error) from error
    except StageAbortedError as error:
        reason, rank = step.find_cause(error, f"{stage_name}, cause")
        if (reason, rank) == (error.reason, error.rank):
            raise
        raise StageAbortedError(f"{stage_name}: {reason}", reason, rank) from error
    session.mark_done(hook)
