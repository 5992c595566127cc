"""Decide, together with the other ranks, whether a group of SGLang gets a handle, and get it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    import comm_core as comm

__all__ = ["SERVED", "get_handle"]

#: The kinds of groups in which SGLang all-reduces, the part of a group's name before the colon. SGLang enters not all
#: of them when it captures graphs.
SERVED = frozenset(
    {
        *("tp", "pdmux_prefill_tp", "attention_tp", "shared_experts_tp", "moe_tp"),
        *("attn_cp", "dcp", "moe_dp", "moe_ep"),
    }
)

_log = logging.getLogger("sglang.comm_sglang")


def get_handle(coordinator: Any, objection: str | None, *, vote_s: float | None = None) -> comm.Backend | None:
    """Return the handle for a `GroupCoordinator`, or None on all its ranks. Collective over the group.

    Args:
        coordinator: the group; its process groups exist.
        objection: this rank's reason against a handle.
        vote_s: how long this rank waits for the votes of the others, in seconds; None for `integration.VOTE_S`.
    """
    name, cpu_group, device_group = coordinator.unique_name, coordinator.cpu_group, coordinator.device_group
    if name.partition(":")[0] not in SERVED or torch.version.hip is not None:
        return None  # no backend serves AMD's GPUs
    if dist.get_backend(device_group) not in ("gloo", "nccl"):
        return None  # other devices, and groups that ranks leave and join
    try:
        from comm_core import integration
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises; the others must hear of it
        reason = f"comm_core can't be imported: {type(error).__name__}: {error}"
        rank = dist.get_rank(cpu_group)
        store = distributed_c10d._get_process_group_store(cpu_group)  # noqa: SLF001 - as in comm_core
        store.set(f"comm-sglang/{rank}", reason)
        _log.warning("group %r: comm-sglang leaves all-reduces to SGLang on all ranks: rank %d: %s", name, rank, reason)
        return None
    return integration.get_handle(
        name,
        cpu_group,
        device_group,
        package="comm-sglang",
        engine="SGLang",
        log=_log,
        objection=objection,
        vote_s=integration.VOTE_S if vote_s is None else vote_s,
        deterministic=True if _is_deterministic() else None,
    )


def _is_deterministic() -> bool:
    """Return whether SGLang's settings ask for one order of summation, whatever the batch."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.get())
