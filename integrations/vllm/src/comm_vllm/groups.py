"""Decide, together with the other ranks, whether a group of vLLM gets a handle, and get it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    import comm_core as comm

__all__ = ["SERVED", "get_handle"]

#: The kinds of groups in which vLLM all-reduces, the part of a group's name before the colon: tensor parallelism,
#: decode context parallelism, which is a part of it, and tensor parallelism of Engram's embeddings. vLLM's groups of
#: experts gather and scatter instead, and the experts' sums go through "tp".
SERVED = frozenset({"tp", "dcp", "etp"})

_log = logging.getLogger("vllm.comm_vllm")


def get_handle(
    name: str, cpu_group: dist.ProcessGroup, device_group: dist.ProcessGroup | None, *, vote_s: float | None = None
) -> comm.Backend | None:
    """Return the group's handle, or None on all its ranks. Collective over the group.

    Args:
        name: vLLM's name of the group, such as "tp:0".
        cpu_group: the group's process group on CPUs, which carries the votes.
        device_group: the group's process group on its devices, which gets the handle.
        vote_s: how long this rank waits for the votes of the others, in seconds; None for `integration.VOTE_S`.
    """
    if name.partition(":")[0] not in SERVED:
        return None
    try:
        from comm_core import integration
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises; the others must hear of it
        reason = f"comm_core can't be imported: {type(error).__name__}: {error}"
        with contextlib.suppress(KeyError):  # a stateless group has no store, and no peers that vote
            store = distributed_c10d._get_process_group_store(cpu_group)  # noqa: SLF001 - as in comm_core
            rank = dist.get_rank(cpu_group)
            store.set(f"comm-vllm/{rank}", reason)
            _log.warning("group %r: comm-vllm leaves all-reduces to vLLM on all ranks: rank %d: %s", name, rank, reason)
        return None
    from vllm import envs

    return integration.get_handle(
        name,
        cpu_group,
        device_group,
        package="comm-vllm",
        engine="vLLM",
        log=_log,
        vote_s=integration.VOTE_S if vote_s is None else vote_s,
        deterministic=True if envs.VLLM_BATCH_INVARIANT else None,
    )
