"""What runs in the ranks for test_c10d.py: groups of the backend "comm" that are made, destroyed, or fail."""

from __future__ import annotations

import os
import signal
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from c10d_ranks import mine, place, world
from comm_core._group.states import all_states
from comm_core._handle.operators import find_handle
from harness import side_store


def groups() -> dict[str, Any]:
    """Groups of a part of the ranks, of all, of one, and of another backend; each is destroyed at the end."""
    rank, size, total = place()
    few, whole = dist.new_group([0, size - 1]), dist.new_group()
    alone, gloo = dist.new_group([rank], use_local_synchronization=True), dist.new_group(backend="gloo")
    members = {"whole": whole, "alone": alone, "gloo": gloo, **({"few": few} if rank in (0, size - 1) else {})}
    sums = {}
    for name, group in members.items():
        x = mine()
        dist.all_reduce(x, group=group)
        sums[name] = x[0].item()
    found = {
        "sums": sums,
        "expected": {
            "whole": total,
            "alone": rank + 1,
            "gloo": total,
            **({"few": 1 + size} if "few" in members else {}),
        },
        "kinds": {name: dist.get_backend(group) for name, group in members.items()},
        "handles": comm.get_backend(whole) is comm.get_backend(whole) and comm.get_backend().name,
        "config": dist.get_backend_config(),
        "operator": torch.ops.comm_core.all_reduce(mine(), world().group_name)[0].item() == total,
    }
    dist.barrier()
    for name in ("few", "whole"):
        if name in members:
            dist.destroy_process_group(members[name])
    found["left"] = sorted(state.group is world().plain for state in all_states() if state.group is not None)
    return found


def alone_after_a_failure() -> dict[str, Any]:
    """The ranks' settings differ: torch's own backends serve, and one rank says why."""
    x = mine()
    dist.all_reduce(x)
    return {"sum": x[0].item(), "handle": find_handle(world().group_name), "states": len(all_states())}


def again(backend: str) -> list[float]:
    """Destroy the job's groups and make them again, with another name of the backend, in one process."""
    sums = []
    for number in range(3):
        x = mine()
        dist.all_reduce(x)
        sums.append(x[0].item())
        store = dist.PrefixStore(f"again {number}", side_store())
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        assert all_states() == []
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return sums


def a_peer_is_killed() -> str:
    """The last rank dies; the others' sums must raise."""
    x = mine()
    dist.all_reduce(x)
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(x)
    except comm.CommError as error:
        return str(error)
    raise AssertionError("a sum without the killed rank returned")
