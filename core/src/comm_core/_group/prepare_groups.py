"""`comm.pre_capture_init`: prepares every group in turn, and serves by what came of it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comm_core._control.deadline import describe
from comm_core._control.stage import Stage
from comm_core._group.handles import GroupState, translate_stage_errors
from comm_core._group.membership import in_worker
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._group.prepare import prepare, step_name
from comm_core.context import Shapes
from comm_core.errors import BackendUnavailableError, CommError
from comm_core.types import DTYPES

if TYPE_CHECKING:
    import torch

__all__ = ["check_shapes", "prepare_groups"]

_log = logging.getLogger("comm_core")


def check_shapes(max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Shapes:
    """The arguments of `comm.pre_capture_init`.

    Raises:
        TypeError, ValueError: what no call could have.
    """
    for name, value in (("max_tokens", max_tokens), ("hidden_size", hidden_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: a number of at least 1 is needed")
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: one of {', '.join(DTYPES)} is needed, as a torch dtype")
    return Shapes(max_tokens, hidden_size, dtype)


def prepare_groups(states: Sequence[GroupState], shapes: Shapes) -> None:
    """Prepare every group that has a handle, whatever becomes of the others: their ranks wait there for this one.

    Raises:
        CommError: the first failure, once all groups were prepared.
    """
    failures = [failure for state in states if (failure := _failure(state, shapes)) is not None]
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # an error's traceback holds this frame, a cycle that would keep tensors alive


def _failure(state: GroupState, shapes: Shapes) -> CommError | None:
    """Prepare a group; returns why that failed, if it did."""
    try:
        with state.lock:
            _prepare_group(state, shapes)
    except CommError as error:
        return error
    except Exception as error:  # noqa: BLE001 - raised once the other groups had their turn
        failure = CommError(f"{state.title}: {describe(error)}")
        failure.__cause__ = error
        return failure
    return None


def _prepare_group(state: GroupState, shapes: Shapes) -> None:
    agreed, serving = state.agreed, state.serving
    if serving is None:
        return
    if agreed is None:
        serving.warm_up(shapes)
        return
    with translate_stage_errors(state):
        if serving.failure is not None:
            with Stage(agreed.member.control, step_name(state.preparations)) as stage:
                raise stage.abort(serving.failure)
        planned = prepare(agreed, shapes, state.preparations)
    if planned is agreed:
        return
    # Until the fallback was seen to work, the next call begins anew.
    state.serve_by(dataclasses.replace(planned, prepared=agreed.prepared))
    serving.adopt(planned.decision, planned.sessions)
    try:
        warm_up = functools.partial(serving.warm_up, shapes)
        in_worker(warm_up, planned.member, "torch.distributed's first call")
    except Exception as error:
        raise CommError(f"{state.title}: the fallback can't be used: {describe(error)}") from error
    state.serve_by(planned)
    _report_losses(state, agreed, planned)


def _report_losses(state: GroupState, before: NegotiatedGroup, after: NegotiatedGroup) -> None:
    """Log what a preparation has cost the group; raise, on all ranks, where it is a backend that the caller named."""
    lost = [
        candidate
        for candidate in after.decision.candidates
        if candidate.verdict == "failed" and candidate not in before.decision.candidates
    ]
    for candidate in lost:
        where = "" if candidate.rank is None else f"{after.member.control.label(candidate.rank)}: "
        text = f"backend {candidate.name!r} can't serve {state.title} any more: {where}{candidate.reason}"
        if candidate.name in (state.request.backends or ()):
            raise BackendUnavailableError(f"{text}. get_backend(backends=...) names it")
        if after.member.control.rank == 0:
            _log.warning("%s. Falling back", text)
