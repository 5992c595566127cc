"""Create a group's `Serving`: negotiated with the other ranks, or for one rank alone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import StageAbortedError, end_incarnation
from comm_core._control.store import Control, store_of
from comm_core._group.local_inputs import (
    check_backends,
    gather_local_inputs,
    is_fake,
    other_device_types,
    topology_of_one,
)
from comm_core._group.negotiation import negotiate
from comm_core._group.states import GroupState, translate_stage_errors, used_incarnations
from comm_core._handle import fallback
from comm_core._handle.serving import Serving
from comm_core._plan.decide import Slate
from comm_core.errors import BackendUnavailableError
from comm_core.topology import Topology
from comm_core.types import TERMINAL

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
    if is_fake(group):
        return _create_for_fake_group(state, group)
    return _create_negotiated(state, group)


def _create_negotiated(state: GroupState, group: dist.ProcessGroup) -> Serving:
    raise_if_capturing(
        f"{state.title} has no handle yet, and its ranks can't negotiate one",
        "Call comm.get_backend(group) before the capture",
    )
    check_backends(group)
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
    if state.group is None:
        _warn_without_world()
    copy = fallback.all_reduce_without_world if state.group is None else fallback.single_rank_all_reduce
    return _serve_without_peers(state, topology_of_one(state.group), copy, ("cuda", "cpu"))


def _create_for_fake_group(state: GroupState, group: dist.ProcessGroup) -> Serving:
    """Serve a group whose other ranks don't exist by torch's backend "fake", which sends nothing.

    Raises:
        BackendUnavailableError: the caller named other backends.
    """
    named = [name for name in state.request.backends or () if name != TERMINAL]
    if named:
        raise BackendUnavailableError(
            f"backend {named[0]!r} was named for {state.title} but can't serve it: torch's backend \"fake\" plays the "
            "group's other ranks, and they can't answer. Leave get_backend(backends=...) out: torch.distributed serves "
            "this group alone"
        )
    own = topology_of_one(group)
    # The other ranks are made up: each is like this one.
    ranks = [dataclasses.replace(own.ranks[0], global_rank=rank) for rank in dist.get_process_group_ranks(group)]
    topology = Topology.of(ranks, own.device_types)
    return _serve_without_peers(
        state, topology, fallback.torch_distributed, other_device_types(group, topology.device_types)
    )


def _serve_without_peers(
    state: GroupState,
    topology: Topology,
    terminal: Callable[..., torch.Tensor],
    torch_device_types: tuple[str, ...],
) -> Serving:
    """Serve every call by the terminal fallback; nothing is negotiated with other processes."""
    device = torch.device("cpu")
    if "cuda" in topology.device_types:
        device = torch.device("cuda", torch.cuda.current_device())
    decision = Slate(()).decision(topology.device_types)
    return Serving(
        decision, topology, state.title, device, (terminal, state.group), {}, torch_device_types=torch_device_types
    )


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
