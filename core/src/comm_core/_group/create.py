"""Create a group's `Serving`, negotiated with the other ranks if there are any."""

from __future__ import annotations

import torch.distributed as dist

from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import StageAbortedError, end_incarnation
from comm_core._control.store import Control, store_of
from comm_core._group.local_inputs import gather_local_inputs, other_device_types
from comm_core._group.negotiation import negotiate
from comm_core._group.states import GroupState, translate_stage_errors, used_incarnations
from comm_core._group.unnegotiated import create_unnegotiated, is_unnegotiated
from comm_core._handle import rank_order
from comm_core._handle.serving import Serving

__all__ = ["create_serving"]


def create_serving(state: GroupState) -> Serving:
    """Create the group's `Serving`. Collective, in groups of more than one rank.

    Raises:
        CaptureError: the current stream captures.
        CommError: the ranks couldn't agree; see `comm_core.get_backend`.
    """
    group = state.group
    if group is None or is_unnegotiated(group):
        return create_unnegotiated(state)
    return _create_negotiated(state, group)


def _create_negotiated(state: GroupState, group: dist.ProcessGroup) -> Serving:
    raise_if_capturing(
        f"{state.title} has no handle yet, and its ranks can't negotiate one",
        "Call comm.get_backend(group) before the capture",
    )
    ranks = tuple(dist.get_process_group_ranks(group))
    # First of all, before the settings are read: a rank that fails from here on can tell the others.
    control = state.control = Control(store_of(group), dist.get_rank(group), ranks, timeout_s=0.0)
    control.join(used_incarnations.setdefault(state.name, set()))
    try:
        local = gather_local_inputs(group, state.request)
        control.timeout_s = local.control_timeout_s
        with translate_stage_errors(state):
            negotiated = negotiate(group, state.title, control, local)
        serving = Serving(
            negotiated.decision,
            negotiated.topology,
            state.title,
            local.device,
            rank_order.terminal_fallback(group, state.title, deterministic=local.deterministic),
            negotiated.sessions,
            torch_device_types=other_device_types(group, negotiated.topology.device_types),
            control=control,
            wait_timeout_s=local.settings.wait_timeout_s,
            profiles=local.settings.profile,
        )
    except BaseException as error:
        if not isinstance(error.__cause__, StageAbortedError):  # such an error is on all ranks already
            end_incarnation(control, error)
        control.finish(error)
        raise
    state.adopt(negotiated)
    return serving
