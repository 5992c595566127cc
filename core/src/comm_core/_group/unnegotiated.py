"""Create the `Serving` of a group without peers to negotiate with: one rank, or ranks that torch makes up."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from comm_core._group.local_inputs import backends_of, other_device_types, topology_of_one
from comm_core._group.states import GroupState
from comm_core._handle import fallback
from comm_core._handle.serving import Serving
from comm_core._plan.decide import Slate
from comm_core.env import PREFIX, Settings
from comm_core.errors import BackendUnavailableError, NegotiationError
from comm_core.topology import Topology
from comm_core.types import TERMINAL

__all__ = ["create_unnegotiated", "is_unnegotiated"]

_log = logging.getLogger("comm_core")


def is_unnegotiated(group: dist.ProcessGroup) -> bool:
    """Return whether this rank has no peers to negotiate with.

    Local: a group has the same backends on all ranks, so they raise alike, and none waits.

    Raises:
        NegotiationError: it has peers, but core can't serve the group.
    """
    backends = backends_of(group)
    # "fake" plays the other ranks of a job in one process, and sends nothing.
    if dist.get_world_size(group) == 1 or set(backends.values()) == {"fake"}:
        return True
    if "threaded" in backends.values():
        raise NegotiationError(
            "this group can't negotiate: by torch's backend \"threaded\" its ranks are threads of one process, and "
            "comm_core needs a process for each rank. Call torch.distributed itself for this group"
        )
    if "cpu" not in backends and backends.get("cuda", "gloo") == "gloo":
        raise NegotiationError(
            f"this group can't negotiate: its torch.distributed backends are {dist.get_backend_config(group)}, and "
            "comm_core serves CPU tensors, and CUDA tensors by any backend but Gloo. Call torch.distributed itself for "
            "this group, or create one that has a backend for such tensors, for example 'cpu:gloo' or 'cuda:nccl'"
        )
    return False


def create_unnegotiated(state: GroupState) -> Serving:
    """Serve every call by the terminal fallback.

    Raises:
        BackendUnavailableError: the caller named other backends, and the group has made-up ranks.
        ValueError: the variable `COMM_CORE_DETERMINISTIC` can't be read.
    """
    group = state.group
    topology = topology_of_one(group)
    torch_device_types: tuple[str, ...] = ("cuda", "cpu")
    terminal: Callable[..., torch.Tensor] = fallback.single_rank_all_reduce
    if group is None:
        _warn_without_world()
        terminal = fallback.all_reduce_without_world
    elif dist.get_world_size(group) > 1:
        _refuse_named(state)
        terminal = fallback.torch_distributed
        # The other ranks are made up: each is like this one.
        ranks = (dataclasses.replace(topology.ranks[0], global_rank=r) for r in dist.get_process_group_ranks(group))
        topology = Topology.of(ranks, topology.device_types)
        torch_device_types = other_device_types(group, topology.device_types)
    device = torch.device("cpu")
    if "cuda" in topology.device_types:
        device = torch.device("cuda", torch.cuda.current_device())
    slate = Slate((), deterministic=_is_deterministic(state.request.deterministic))
    decision = slate.decision(topology.device_types)
    return Serving(
        decision, topology, state.title, device, (terminal, group), {}, torch_device_types=torch_device_types
    )


def _is_deterministic(asked: bool | None) -> bool:
    """Return whether the group is deterministic: its sums are so anyway, but core's norm has a way of its own then."""
    name = f"{PREFIX}DETERMINISTIC"
    return Settings.read({name: os.environ.get(name, "")}).deterministic if asked is None else asked


def _refuse_named(state: GroupState) -> None:
    named = [name for name in state.request.backends or () if name != TERMINAL]
    if named:
        raise BackendUnavailableError(
            f"backend {named[0]!r} was named for {state.title} but can't serve it: torch's backend \"fake\" plays the "
            "group's other ranks, and they can't answer. Leave get_backend(backends=...) out: torch.distributed serves "
            "this group alone"
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
