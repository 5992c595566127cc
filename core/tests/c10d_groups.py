"""What runs in the ranks for test_c10d.py: groups of the backend "comm" that are made, destroyed, or fail."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import comm_core as comm
import torch
import torch.distributed as dist
from c10d_ranks import Counting, holds, mine, other_collectives, place, world
from comm_core._c10d import create
from comm_core._group.states import GroupState, all_states
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


def summed(group: Any = None) -> float:
    x = mine()
    dist.all_reduce(x, group=group)
    return x[0].item()


def error_of(call: Callable[[], Any]) -> str:
    """The type of the error that a call raises; "" for none."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return type(error).__name__
    return ""


def closed_and_reopened() -> list[tuple[float, int | None]]:
    """A sum, and how many sums the handle has served: with a handle, after its close, and with a new one, twice."""
    found: list[tuple[float, int | None]] = []
    for _ in range(2):
        counting = Counting()
        found.append((summed(), counting.served))
        comm.close(dist.group.WORLD)
        assert find_handle(world().group_name) is None
        found.append((summed(), counting.served))
        comm.get_backend()
    return found


def one_rank_gets_no_handle() -> tuple[float, bool]:
    """The ranks negotiate, but then one fails: the others mustn't wait for it."""
    broken = mock.patch.object(GroupState, "create_backend", side_effect=OSError("no room"))
    with broken if dist.get_rank() == 0 else contextlib.nullcontext():
        group = dist.new_group()
    return summed(group), find_handle(group.group_name) is None


def one_rank_has_no_nccl() -> float:
    """The first rank has a GPU, as it believes."""
    believes = mock.patch.object(create, "_has_nccl", return_value=True)
    with believes if dist.get_rank() == 0 else contextlib.nullcontext():
        group = dist.new_group()
    return summed(group)


def aborted_while_others_wait() -> tuple[str, list[GroupState]]:
    """The last rank aborts the group: the sums of the others end, which wait for it."""
    rank, size, _ = place()
    summed()
    x = mine()
    if rank == size - 1:
        side_store().wait(["begun"])
        world().abort()
        return "", all_states()
    work: Any = dist.all_reduce(x, async_op=True)
    side_store().set("begun", "")
    error = error_of(work.wait)
    world().abort()
    return error, all_states()


def aborted_while_a_thread_waits() -> tuple[str, list[GroupState]]:
    """Every rank aborts the group; on the first one, a thread waits in a sum that the others don't join."""
    rank = dist.get_rank()
    summed()
    error = ""
    if rank == 0:
        work: Any = dist.all_reduce(mine(), async_op=True)
        world().abort()
        error = error_of(work.wait)
        side_store().set("aborted", "")
    else:
        side_store().wait(["aborted"])
        world().abort()
    return error, all_states()


def destroyed_by_one_rank() -> bool:
    """The first rank destroys a group for which the others don't come meanwhile."""
    group = dist.new_group()
    if dist.get_rank() == 0:
        dist.destroy_process_group(group)
        side_store().set("destroyed", "")
    else:
        side_store().wait(["destroyed"])
        dist.destroy_process_group(group)
    return len(all_states()) == 1


def a_wait_with_a_timeout() -> tuple[str, bool, float, bool]:
    """The first rank's wait ends before the others join the sum; a second wait gets it."""
    if dist.get_rank() > 0:
        side_store().wait(["ended"])
        return "", False, summed(), True
    x = mine()
    work: Any = dist.all_reduce(x, async_op=True)
    error = error_of(lambda: work.wait(timedelta(milliseconds=50)))
    early = work.is_completed()
    side_store().set("ended", "")
    work.wait(timedelta(seconds=100))
    return error, early, x[0].item(), work.is_completed() and work.is_success() and work.exception() is None


def collectives_beside_late_sums() -> dict[str, bool]:
    """Asynchronous sums that the first rank's thread begins late, each before another collective."""
    rank, size, total = place()

    def asynchronous_maximum() -> bool:
        x = mine()
        work: Any = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
        work.wait()
        return holds(x, size)

    def a_message_after_both() -> bool:
        """The other ranks join the sum and the broadcast after a message."""
        x, y = mine(), mine()
        if rank == 1:
            dist.recv(y, 0)
        work: Any = dist.all_reduce(x, async_op=True)
        broadcast: Any = dist.broadcast(z := mine(), 0, async_op=True)
        if rank == 0:
            dist.send(y, 1)
        work.wait()
        broadcast.wait()
        return holds(x, total) and holds(z, 1) and (rank > 1 or holds(y, 1))

    def late() -> list[torch.Tensor]:
        time.sleep(0.2)
        return []

    found = {}
    cases = {"asynchronous maximum": asynchronous_maximum, "a message after both": a_message_after_both}
    for name, case in (cases | other_collectives()).items():
        x = mine()
        if rank == 0:
            world()._queue.put(late)
        work: Any = dist.all_reduce(x, async_op=True)
        if rank > 0:
            time.sleep(0.1)  # its thread begins the sum meanwhile
        right = case()
        work.wait()
        found[name] = right and holds(x, total)
    return found


def two_threads() -> tuple[list[bool], str | None]:
    """Threads that sum at once, each in turn with and without `async_op`."""
    _, _, total = place()
    right = []

    def work() -> None:
        for step in range(200):
            x = mine()
            begun = dist.all_reduce(x, async_op=step % 2 == 1)
            if begun is not None:
                begun.wait()
            right.append(bool((x == total).all()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return right, comm.get_backend().failure


def averages() -> list[tuple[float, float]]:
    """Averages of large numbers, on the backend "comm" and on Gloo."""
    gloo = dist.new_group(backend="gloo")
    found = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        values = []
        for group in (None, gloo):
            x = torch.full((8,), 60000.0 + dist.get_rank()).to(dtype)
            dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group)
            values.append(x[0].item())
        found.append((values[0], values[1]))
    return found
