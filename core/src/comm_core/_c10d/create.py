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
from comm_core._control.unlisted_group import make_group
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
    # As torch names the group itself in a moment, and thereby the backends that both share.
    plain._set_group_name(options.group_id)  # noqa: SLF001
    return CommProcessGroup(plain, name, _negotiate(plain, options))


def _negotiate(plain: dist.ProcessGroup, options: Any) -> Backend | None:
    """Negotiate a handle; return None, on all ranks, if any rank has none."""
    handle, failure = None, ""
    with _has_world(plain):
        try:
            handle = get_backend(plain)
        except Exception as error:  # noqa: BLE001 - whatever it is, torch's own backends can serve
            failure = describe(error)
        if not _all_agree(handle is not None, options) and handle is not None:
            close(plain)
            handle, failure = None, "another rank has no handle"
    if handle is None and options.group_rank == 0:
        _log.warning("comm_core: torch's own backends serve group %r alone: %s", options.group_id, failure)
    return handle


def _all_agree(ok: bool, options: Any) -> bool:
    """Return whether all ranks of the group are `ok`. Collective, over the group's store."""
    store, size = options.store, options.group_size
    # A job that destroys its groups and makes them again may use the same store, with the same names.
    incarnation = (store.add("comm_core/arrived", 1) - 1) // size
    key = f"comm_core/{incarnation}"
    store.add(f"{key}/failed", int(not ok))
    if store.add(f"{key}/voted", 1) == size:
        store.set(f"{key}/verdict", str(store.add(f"{key}/failed", 0)))
    store.wait([f"{key}/verdict"], options.timeout)
    return bool(store.get(f"{key}/verdict") == b"0")


@contextlib.contextmanager
def _has_world(plain: dist.ProcessGroup) -> Iterator[None]:
    """Let the plain group be torch's default group while torch creates that: negotiations need the job's ranks."""
    if dist.is_initialized():
        yield
        return
    _c10d._update_default_pg(plain)  # noqa: SLF001
    try:
        yield
    finally:
        _c10d._update_default_pg(None)  # noqa: SLF001
