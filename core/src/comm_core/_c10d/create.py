"""Create the process groups of the backend "comm", for torch's `init_process_group` and `new_group`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from comm_core._c10d.process_group import CommProcessGroup
from comm_core._control.deadline import describe
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError, end_incarnation
from comm_core._control.store import Control
from comm_core._control.unlisted_group import make_group
from comm_core._group.api import get_backend
from comm_core._group.close import abort_handle
from comm_core._group.states import used_incarnations

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
    name = f"{options.group_id}/plain"
    # Apart from the negotiation's, which may fail on one rank alone.
    store = _c10d.PrefixStore("comm_core_vote", options.store)
    control = Control(store, options.group_rank, tuple(ranks), options.timeout.total_seconds())
    control.join(used_incarnations.setdefault(name, set()))
    try:
        plain = make_group(
            ranks,
            options.group_rank,
            _agree_on_backends(control),
            options.store,
            name,
            timeout=options.timeout,
            desc="comm_core: torch's own backends of a group of the backend comm",
            options=backend_options,
        )
        # torch will give the outer group this name, and rename the shared backends; the plain group must match.
        plain._set_group_name(options.group_id)  # noqa: SLF001
        # torch 2.14 and newer show the caller's `device_id` here; older ones keep it.
        plain.bound_device_id = getattr(getattr(options, "process_group", None), "bound_device_id", None)
        group = CommProcessGroup(plain, name)
        with _aborted_on_error(group), _temporary_world(plain):
            _negotiate(plain, options.group_id, control)
    except BaseException as error:  # this rank leaves, and the others mustn't wait for its votes
        end_incarnation(control, error)
        raise
    finally:
        control.finish()
    return group


def _agree_on_backends(control: Control) -> str:
    """Return the plain group's backends: with NCCL if every rank has it and a GPU. Collective."""
    with Stage(control, "backends") as stage:
        everywhere = stage.agree(_has_nccl(), "no GPU, or no NCCL").ok
    return "cpu:gloo,cuda:nccl" if everywhere else "gloo"


def _has_nccl() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _negotiate(plain: dist.ProcessGroup, title: str, control: Control) -> None:
    """Negotiate a handle; without one on all ranks if any rank failed to get one. Collective."""
    failure = ""
    try:
        get_backend(plain)
    except Exception as error:  # noqa: BLE001 - whatever it is, torch's own backends can serve
        failure = describe(error)
    failures = _gather_failures(control, failure)
    if failures:
        abort_handle(plain)  # a rank without a handle wouldn't come to close it
    if failures and control.rank == 0:
        _log.warning("comm_core: torch's own backends serve all calls of group %r: %s", title, "; ".join(failures))


def _gather_failures(control: Control, failure: str) -> list[str]:
    """Return the failures of all ranks, the same on each; `failure` is this rank's, "" for none. Collective."""
    try:
        with Stage(control, "vote") as stage:
            votes = stage.all_gather(failure)
    except StageTimeoutError:
        raise
    except StageAbortedError as error:  # a rank has left
        votes = [error.reason if rank == error.rank else "" for rank in range(control.world_size)]
    return [f"rank {rank}: {vote}" for rank, vote in enumerate(votes) if vote]


@contextlib.contextmanager
def _aborted_on_error(group: CommProcessGroup) -> Iterator[None]:
    try:
        yield
    except BaseException:
        group.abort()
        raise


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
