"""Create the process groups of the backend "comm", for torch's `init_process_group` and `new_group`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from comm_core._c10d.process_group import CommProcessGroup
from comm_core._control.deadline import describe
from comm_core._control.unlisted_group import forget_group, make_group
from comm_core._group.api import close, get_backend

if TYPE_CHECKING:
    from comm_core._handle.backend import Backend

__all__ = ["create_group"]

_log = logging.getLogger("comm_core")
_c10d: Any = distributed_c10d


def create_group(options: Any, backend_options: Any = None) -> CommProcessGroup:
    """Create this process's part of a group of the backend "comm". Collective over the group's ranks.

    All ranks negotiate a handle here, so none waits for another in the first call. If they can't, torch's own backends
    serve the group alone, on all ranks, with one warning.

    Args:
        options: torch's `_DistributedBackendOptions`: the store, the rank, the ranks of the job, the timeout, the name.
        backend_options: the `pg_options` of the caller, for NCCL.
    """
    ranks = options.global_ranks_in_group or list(range(options.group_size))
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    name = f"{options.group_id}/plain"
    plain = make_group(
        ranks,
        options.group_rank,
        backends,
        options.store,
        name,
        timeout=options.timeout,
        desc="comm_core: torch's own backends of a group of the backend comm",
        options=backend_options,
    )
    # torch will give the outer group this name, and rename the shared backends; the plain group must match.
    plain._set_group_name(options.group_id)  # noqa: SLF001
    try:
        return CommProcessGroup(plain, name, _negotiate(plain, options))
    except BaseException:
        plain.abort()
        forget_group(plain, name)
        raise


def _negotiate(plain: dist.ProcessGroup, options: Any) -> Backend | None:
    """Negotiate a handle; return None on all ranks if any rank failed to get one."""
    handle, failure = None, ""
    with _temporary_world(plain):
        try:
            handle = get_backend(plain)
        except Exception as error:  # noqa: BLE001 - whatever it is, torch's own backends can serve
            failure = describe(error)
        except BaseException as error:  # it leaves, and the others mustn't wait for its vote
            _vote(describe(error), options)
            raise
        failures = _gather_votes(failure, options)
        if failures and handle is not None:
            close(plain)
    if failures and options.group_rank == 0:
        _log.warning(
            "comm_core: torch's own backends serve all calls of group %r: %s", options.group_id, "; ".join(failures)
        )
    return None if failures else handle


def _vote(failure: str, options: Any) -> str:
    """Send this rank's failure, "" for none, over the group's store; return the prefix of the votes' keys."""
    store, size = options.store, options.group_size
    # A job that destroys its groups and makes them again may use the same store, with the same names.
    key = f"comm_core/votes {(store.add('comm_core/arrived', 1) - 1) // size}"
    store.set(f"{key}/{options.group_rank}", failure)
    return key


def _gather_votes(failure: str, options: Any) -> list[str]:
    """Vote, and return the failures of all ranks, the same on each. Collective."""
    key = _vote(failure, options)
    keys = [f"{key}/{rank}" for rank in range(options.group_size)]
    options.store.wait(keys, options.timeout)
    votes = [options.store.get(each).decode(errors="replace") for each in keys]
    return [f"rank {rank}: {vote}" for rank, vote in enumerate(votes) if vote]


@contextlib.contextmanager
def _temporary_world(plain: dist.ProcessGroup) -> Iterator[None]:
    """Let the plain group be torch's default group while torch creates that: negotiations need the job's ranks."""
    if dist.is_initialized():
        yield
        return
    _c10d._update_default_pg(plain)  # noqa: SLF001
    try:
        yield
    finally:
        _c10d._update_default_pg(None)  # noqa: SLF001
