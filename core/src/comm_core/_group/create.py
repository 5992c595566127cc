"""Create a group's `Serving`: negotiated with the other ranks, or for one rank alone."""

from __future__ import annotations

import contextlib
import logging
import os

import torch
import torch.distributed as dist

from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import StageAbortedError, end_incarnation
from comm_core._control.store import Control, store_of
from comm_core._group.local_inputs import gather_local_inputs, other_device_types, topology_of_one
from comm_core._group.negotiation import negotiate
from comm_core._group.states import GroupState, translate_stage_errors, used_incarnations
from comm_core._handle import fallback
from comm_core._handle.serving import Serving
from comm_core._plan.decide import Slate

__all__ = ["create_serving"]

_log = logging.getLogger("comm_core")


def create_serving(state: GroupState) -> Serving:
    """Create the group's `Serving`. Collective, in groups of more than one rank.

    Raises:
        CaptureError: the current stream captures.
        CommError: the ranks couldn't agree; see `comm_core.get_backend`.
    """
    group = state.group
    if group is None or dist.get_world_size(group) == 1:
        return _create_for_one_rank(state)
    if "fake" in dist.get_backend_config(group):
        return _create_for_fake_group(state, group)
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
        terminal = fallback.TerminalFallback(group, state.title)
        serving = Serving(
            negotiated.decision,
            negotiated.topology,
            state.title,
            local.device,
            (fallback.TerminalFallback.all_reduce, terminal),
            negotiated.sessions,
            torch_device_types=other_device_types(group, negotiated.topology.device_types),
            control=control,
            wait_timeout_s=local.settings.wait_timeout_s,
        )
    except BaseException as error:
        if not isinstance(error.__cause__, StageAbortedError):  # such an error is on all ranks already
            end_incarnation(control, error)
        control.finish()
        raise
    state.adopt(negotiated)
    return serving


def _create_for_one_rank(state: GroupState) -> Serving:
    """Serve a group of one rank by a copy, without any backend."""
    topology = topology_of_one(state.group)
    device = torch.device("cpu")
    if "cuda" in topology.device_types:
        device = torch.device("cuda", torch.cuda.current_device())
    decision = Slate(()).decision(topology.device_types)
    if state.group is None:
        _warn_without_world()
    copy = fallback.all_reduce_without_world if state.group is None else fallback.single_rank_all_reduce
    return Serving(decision, topology, state.title, device, (copy, state.group), {}, torch_device_types=("cuda", "cpu"))


def _create_for_fake_group(state: GroupState, group: dist.ProcessGroup) -> Serving:
    """Serve one process that plays a rank of many, by torch's "fake" backend, which sends nothing."""
    topology = topology_of_one(group)
    decision = Slate(()).decision(topology.device_types)
    terminal = (fallback.torch_distributed, group)
    return Serving(decision, topology, state.title, torch.device("cpu"), terminal, {}, torch_device_types=("cuda",))


def _warn_without_world() -> None:
    """Warn if a launcher has started several ranks, since a handle without a process group only copies."""
    with contextlib.suppress(ValueError):
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1:
            _log.warning(
                "comm.get_backend was called before torch.distributed.init_process_group, though WORLD_SIZE=%d: this "
                "handle serves this process alone, and its calls raise once the world exists. Call init_process_group "
                "first",
                world_size,
            )
