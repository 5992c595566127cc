"""Decide, together with the other ranks, whether a group of vLLM gets a handle, and get it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    import comm_core as comm

__all__ = ["SERVED", "get_handle"]

#: The kinds of groups in which vLLM all-reduces, the part of a group's name before the colon: tensor parallelism,
#: decode context parallelism, which is a part of it, and tensor parallelism of Engram's embeddings. vLLM's groups of
#: experts gather and scatter instead, and the experts' sums go through "tp".
SERVED = frozenset({"tp", "dcp", "etp"})

# How long a rank waits for the others' votes, in seconds. They have just created the group together; what may differ is
# the time of importing comm_core.
_VOTE_S = 60.0
_POLL_S = 0.01
# A vote for a handle. A vote against it is the reason.
_YES = "yes"

_log = logging.getLogger("vllm.comm_vllm")


def get_handle(
    name: str, cpu_group: dist.ProcessGroup, device_group: dist.ProcessGroup | None, *, vote_s: float = _VOTE_S
) -> comm.Backend | None:
    """Return the group's handle, or None on all its ranks. Collective over the group.

    Args:
        name: vLLM's name of the group, such as "tp:0".
        cpu_group: the group's process group on CPUs, which carries the votes.
        device_group: the group's process group on its devices, which gets the handle.
        vote_s: how long this rank waits for the votes of the others, in seconds.
    """
    if name.partition(":")[0] not in SERVED or device_group is None or not _is_known(cpu_group, device_group):
        return None
    if dist.get_world_size(cpu_group) == 1:
        return None
    objection = _find_objection()
    objections = _vote(cpu_group, objection or _YES, vote_s)
    if objections:
        _warn(name, "; ".join(f"rank {rank}: {reason}" for rank, reason in objections.items()))
        return None
    import comm_core as comm

    try:
        handle = comm.get_backend(device_group)
    except (comm.CommError, TypeError, ValueError) as error:
        _warn(name, str(error))
        return None
    if dist.get_rank(cpu_group) == 0:
        # Of the smallest message; `explain` has the others.
        _log.info("group %r: all-reduces by comm-core %s, the smallest by %s", name, comm.__version__, handle.name)
        _log.debug("%s", handle.explain())
    return handle


def _is_known(*groups: dist.ProcessGroup) -> bool:
    """Return whether torch knows the groups; a stateless one, as of elastic expert parallelism, it doesn't."""
    try:
        return all(dist.get_rank(group) >= 0 for group in groups)
    except ValueError:
        return False


def _find_objection() -> str | None:
    """Return this rank's reason against a handle, if it has one."""
    from vllm import envs

    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set, and backends choose the order of summation by a message's size"
    try:
        import comm_core as comm

        comm.get_backend  # noqa: B018 - the import of the parts that need torch
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises; the others must hear of it
        return f"comm_core can't be imported: {type(error).__name__}: {error}"
    return None


def _vote(group: dist.ProcessGroup, vote: str, patience_s: float) -> dict[int, str]:
    """Post this rank's vote and return the objections, by rank; empty if all ranks want a handle.

    The votes go through the store of the group, not through its collectives: on a rank where this package isn't
    installed, or isn't loaded, vLLM's own communicator goes on with other collectives.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    # torch has no public function for it; a test pins it.
    store: Any = distributed_c10d._get_process_group_store(group)  # noqa: SLF001
    store.set(_key(rank), vote)
    missing = set(range(world_size)) - {rank}
    objections = {} if vote == _YES else {rank: vote}
    deadline = time.monotonic() + patience_s
    while missing:
        for peer in [peer for peer in sorted(missing) if store.check([_key(peer)])]:
            missing.remove(peer)
            answer = store.get(_key(peer)).decode()
            if answer != _YES:
                objections[peer] = answer
        if not missing or objections:
            break  # one objection decides
        if time.monotonic() > deadline:
            reason = f"no vote within {patience_s:g} s: comm-vllm isn't installed or isn't loaded there"
            return dict.fromkeys(sorted(missing), reason)
        time.sleep(_POLL_S)
    return dict(sorted(objections.items()))


def _key(rank: int) -> str:
    return f"comm_vllm/{rank}"


def _warn(name: str, reason: str) -> None:
    _log.warning("group %r: comm-vllm leaves all-reduces to vLLM on all ranks: %s", name, reason)
