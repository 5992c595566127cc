"""What integrations into serving engines share: a group's ranks agree on a handle, or all keep the engine's all-reduce.

An engine loads its plugins in each process by itself, and goes on without one that fails. So one rank may lack what the
others have, and must not be waited for in a collective: it goes on with collectives of the engine's own. Therefore the
ranks vote in the store of the group, under a deadline. The vote of a rank is the key `PACKAGE/RANK`, such as
"comm-vllm/0": "yes", or the reason against a handle. A rank that can't import comm_core sets it by itself.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

import comm_core
from comm_core._control.store import store_of
from comm_core.errors import CommError
from comm_core.types import TERMINAL, Decision

if TYPE_CHECKING:
    from comm_core._handle.backend import Backend

__all__ = ["VOTE_S", "get_handle"]

#: How long a rank waits for the others' votes, in seconds. They have just created the group together; what may differ
#: is the time of importing comm_core.
VOTE_S = 60.0
_POLL_S = 0.01
_YES = "yes"


def get_handle(
    name: str,
    cpu_group: dist.ProcessGroup,
    device_group: dist.ProcessGroup | None,
    *,
    package: str,
    engine: str,
    log: logging.Logger,
    objection: str | None = None,
    vote_s: float = VOTE_S,
    deterministic: bool | None = None,
) -> Backend | None:
    """Return the group's handle, or None on all its ranks. Collective over the group.

    None without a vote: a group of one rank, one without a device group, and one that torch.distributed doesn't know.

    Args:
        name: the engine's name of the group, for messages.
        cpu_group: the group's process group on CPUs, in the store of which the ranks vote.
        device_group: the group's process group on its devices, which gets the handle.
        package: the integration's distribution, for messages and for the keys of the votes; the variable that turns it
            off has the same name, as `COMM_VLLM` for "comm-vllm".
        engine: the engine's name, for messages.
        log: gets a warning with the reason if the ranks get no handle; else, on the first rank, a line at INFO that
            says which backend serves the smallest message, or a warning if none serves any, and the whole report at
            DEBUG.
        objection: this rank's reason against a handle.
        vote_s: how long this rank waits for the votes of the others, in seconds.
        deterministic: whether the engine needs one reduction order; see `comm_core.get_backend`.
    """
    if device_group is None or not _is_known(cpu_group, device_group) or dist.get_world_size(cpu_group) == 1:
        return None

    def leave(reason: str) -> None:
        log.warning("group %r: %s leaves all-reduces to %s on all ranks: %s", name, package, engine, reason)

    objections = _vote(cpu_group, package, objection or _YES, vote_s)
    if objections:
        leave("; ".join(f"rank {rank}: {reason}" for rank, reason in objections.items()))
        return None
    try:
        handle = comm_core.get_backend(device_group, deterministic=deterministic)
    except (CommError, TypeError, ValueError) as error:
        leave(str(error))
        return None
    if dist.get_rank(cpu_group) == 0:
        if _has_backend(handle.decision):
            version = comm_core.__version__
            log.info("group %r: all-reduces by comm-core %s, the smallest by %s", name, version, handle.name)
        else:
            log.warning(
                "group %r: no backend of comm-core serves all-reduces, so they go to torch.distributed, not to %s's "
                "own: %s. Install a plugin that serves this group, or set %s=0 to keep %s's own",
                *(name, engine, _describe_absence(handle.decision), package.replace("-", "_").upper(), engine),
            )
        log.debug("%s", handle.explain())
    return handle


def _has_backend(decision: Decision) -> bool:
    """Return whether a backend beside the terminal fallback serves some all-reduce."""
    rules = (rule for route in decision.routes if route.op == "all_reduce" for rule in route.rules)
    return any(rule.backend != TERMINAL for rule in rules)


def _describe_absence(decision: Decision) -> str:
    """Return each backend's reason for not serving."""
    reasons = [f"{one.name}: {one.reason}" for one in decision.candidates if one.name != TERMINAL]
    return "; ".join(reasons) or "no plugin is installed"


def _is_known(*groups: dist.ProcessGroup) -> bool:
    """Return whether torch knows the groups; it doesn't know a stateless one, as of elastic expert parallelism."""
    try:
        return all(dist.get_rank(group) >= 0 for group in groups)
    except ValueError:
        return False


def _vote(group: dist.ProcessGroup, package: str, vote: str, timeout_s: float) -> dict[int, str]:
    """Post this rank's vote and return the objections, by rank; empty if all ranks want a handle."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    store = store_of(group)
    store.set(f"{package}/{rank}", vote)
    missing = set(range(world_size)) - {rank}
    objections = {} if vote == _YES else {rank: vote}
    deadline = time.monotonic() + timeout_s
    while missing:
        for peer in [peer for peer in sorted(missing) if store.check([f"{package}/{peer}"])]:
            missing.remove(peer)
            answer = store.get(f"{package}/{peer}").decode()
            if answer != _YES:
                objections[peer] = answer
        if not missing or objections:
            break  # one objection decides
        if time.monotonic() > deadline:
            reason = f"no vote within {timeout_s:g} s: {package} isn't installed or isn't loaded there"
            # For a rank that votes after all.
            store.set(f"{package}/{rank}", f"it had no vote of rank {min(missing)} within {timeout_s:g} s")
            return dict.fromkeys(sorted(missing), reason)
        time.sleep(_POLL_S)
    return dict(sorted(objections.items()))
