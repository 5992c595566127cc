"""`comm.pre_capture_init`: prepare the groups one after the other, and serve by the new plans."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comm_core._control.deadline import describe
from comm_core._control.stage import Stage, StageAbortedError, end_incarnation
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._group.prepare import is_prepared, prepare, stage_name
from comm_core._group.states import GroupState, change_all, translate_stage_errors
from comm_core._group.step import run_in_worker
from comm_core.context import Shapes
from comm_core.errors import BackendUnavailableError, CommError
from comm_core.types import DTYPES

if TYPE_CHECKING:
    import torch

__all__ = ["check_shapes", "prepare_groups", "report_dropped"]

_log = logging.getLogger("comm_core")


def check_shapes(max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Shapes:
    """Validate the arguments of `comm.pre_capture_init` and return them as `Shapes`.

    Raises:
        TypeError: `dtype` isn't one that a backend may serve.
        ValueError: a size isn't an integer of at least 1.
    """
    for name, value in (("max_tokens", max_tokens), ("hidden_size", hidden_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: expected one of the torch dtypes {', '.join(DTYPES)}")
    return Shapes(max_tokens, hidden_size, dtype)


def prepare_groups(states: Sequence[GroupState], shapes: Shapes) -> None:
    """Prepare every group, even after one failed: the ranks of the other groups wait for this rank.

    Raises:
        CommError: the first failure, after all groups had their turn.
    """
    change_all(states, functools.partial(_prepare_or_explain, shapes=shapes))


def _prepare_or_explain(state: GroupState, shapes: Shapes) -> None:
    """Prepare a group; every error is a `CommError`, so that the other groups have their turn."""
    try:
        _prepare_group(state, shapes)
    except CommError:
        raise
    except Exception as error:
        raise CommError(f"{state.title}: {describe(error)}") from error


def _prepare_group(state: GroupState, shapes: Shapes) -> None:
    negotiated, serving = state.negotiated, state.serving
    if serving is None:
        return
    if serving.suspended:
        raise CommError(serving.refusal)
    if negotiated is None:
        serving.warm_up(shapes)
        return
    planned = _plan(state, negotiated, shapes)
    if planned is None:
        return
    # `prepared` stays as it was until the fallback's first call succeeds, so that a next call prepares again.
    state.adopt(dataclasses.replace(planned, prepared=negotiated.prepared))
    serving.adopt(planned.decision, planned.sessions)
    try:
        warm_up = functools.partial(serving.warm_up, shapes)
        run_in_worker(warm_up, planned.member, "torch.distributed's first call")
    except Exception as error:
        raise CommError(f"{state.title}: torch.distributed, the fallback, failed: {describe(error)}") from error
    state.adopt(planned)
    report_dropped(state, negotiated, planned)


def _plan(state: GroupState, negotiated: NegotiatedGroup, shapes: Shapes) -> NegotiatedGroup | None:
    """Return the outcome of a group's preparation; None if it is already prepared.

    A failure before any backend prepares leaves the plan as it was, on all ranks. If a rank then leaves or vanishes,
    every rank's handle refuses further calls: the others would wait for that rank.
    """
    control, serving, begun = negotiated.member.control, state.serving, False
    try:
        with translate_stage_errors(state):
            if serving is not None and serving.failure is not None:
                with Stage(control, stage_name(state.preparations)) as stage:
                    raise stage.abort(serving.failure)
            if is_prepared(negotiated, shapes, state.preparations):
                return None
            begun = True
            return prepare(negotiated, shapes, state.preparations)
    except BaseException as error:
        stage_error = error.__cause__ if isinstance(error.__cause__, StageAbortedError) else None
        if begun or not isinstance(error, CommError) or (stage_error is not None and stage_error.final):
            if stage_error is None:
                end_incarnation(control, error)
            if serving is not None and serving.failure is None:
                serving.retire(
                    f"comm.pre_capture_init failed: {describe(error)}. This handle refuses further calls; close it on "
                    "all ranks and get a new one"
                )
        raise


def report_dropped(state: GroupState, before: NegotiatedGroup, after: NegotiatedGroup) -> None:
    """Log the backends that a new plan has dropped; raise, on all ranks, if the caller named one of them.

    Args:
        state: the group.
        before: the outcome before.
        after: the new outcome, which the handle has adopted.

    Raises:
        BackendUnavailableError: `get_backend(backends=...)` names a backend that was dropped.
    """
    dropped = [
        candidate
        for candidate in after.decision.candidates
        if candidate.verdict == "failed" and candidate not in before.decision.candidates
    ]
    for candidate in dropped:
        rank = "" if candidate.rank is None else f"{after.member.control.label(candidate.rank)}: "
        text = f"backend {candidate.name!r} can no longer serve {state.title}: {rank}{candidate.reason}"
        if candidate.name in (state.request.backends or ()):
            raise BackendUnavailableError(f"{text}. get_backend(backends=...) names it")
        if after.member.control.rank == 0:
            _log.warning("%s. Falling back", text)
