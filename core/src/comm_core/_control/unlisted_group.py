"""Process groups that torch doesn't count or find: for core's own calls, beside the user's groups.

`dist.new_group` can't make them: either all ranks of the job must call, or the name differs between ranks that are in
unequal numbers of groups. So this module alone uses torch's private functions for the creation and the registration of
process groups. Tests pin them on every supported torch release.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["backends_in", "forget_group", "make_group"]

# torch declares none of the private names.
_c10d: Any = distributed_c10d


class _Names(dict[Any, str]):
    """torch's names of process groups, in which `[group]` also finds a group that isn't counted."""

    def __missing__(self, group: Any) -> str:
        return str(group.group_name)


def make_group(
    ranks: Sequence[int],
    rank: int,
    backends: str,
    store: Any,
    name: str,
    *,
    timeout: timedelta,
    desc: str,
    options: Any = None,
) -> dist.ProcessGroup:
    """Create a group of this process and others. Collective over its ranks alone, as far as its backends are.

    Args:
        ranks: the job's rank of each group rank.
        rank: this process's group rank.
        backends: the names of torch's backends: "gloo", "cpu:gloo,cuda:nccl".
        store: the store for the backends; the group's name becomes its prefix.
        name: the group's name, which no other group has.
        timeout: the backends' timeout.
        desc: the group's description, for torch's logs.
        options: NCCL's options, if it is among the backends.
    """
    world = _c10d._world  # noqa: SLF001 - see the module's docstring
    has_nccl = "nccl" in backends
    group: dist.ProcessGroup = _c10d._new_process_group_helper(  # noqa: SLF001
        len(ranks),
        rank,
        list(ranks) if dist.is_initialized() else [],  # torch's way to ask for a default group
        backends,
        store,
        name,
        backend_options=(_nccl_options(timeout) if options is None else options) if has_nccl else None,
        timeout=timeout,
        pg_tag=name,
        group_desc=desc,
    )[0]
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    # torch names the groups of `new_group(use_local_synchronization=True)` by the number of names, and finds groups of
    # given ranks by their tag: this group must not be counted, nor found.
    names = world.pg_names
    names.pop(group, None)
    if names is _c10d._pg_names and not isinstance(names, _Names):  # noqa: SLF001
        _c10d._pg_names = _Names(names)  # noqa: SLF001
    world.tags_to_pg.pop(world.pg_to_tag.pop(group, None), None)
    return group


def forget_group(group: dist.ProcessGroup, name: str) -> None:
    """Remove a group from torch's registries; `name` is the one that it was made with."""
    world = _c10d._world  # noqa: SLF001
    for registry in (world.pg_map, world.pg_group_ranks, world.pg_backend_config, world.pg_coalesce_state):
        registry.pop(group, None)
    with contextlib.suppress(RuntimeError):  # torch has destroyed the job's groups, and forgotten all names
        _c10d._unregister_process_group(name)  # noqa: SLF001


def backends_in(group: dist.ProcessGroup) -> list[Any]:
    """Return the group's backends; one that serves several kinds of devices once."""
    found: list[Any] = []
    for device in group._device_types:  # noqa: SLF001
        backend = group._get_backend(device)  # noqa: SLF001
        backend = getattr(backend, "wrapped_pg", backend)  # the wrapper of TORCH_DISTRIBUTED_DEBUG=DETAIL
        if all(backend is not other for other in found):
            found.append(backend)
    return found


def _nccl_options(timeout: timedelta) -> Any:
    """Return options with which torch doesn't split the new communicator from the job's.

    It does that if the default group is bound to a device, and then every rank of the job would have to take part.
    """

    class Unsplit(dist.ProcessGroupNCCL.Options):
        split_from = property(lambda _self: None, lambda _self, _backend: None)

    options = Unsplit()
    options._timeout = timeout  # noqa: SLF001 - torch warns if it differs from its own argument
    return options
