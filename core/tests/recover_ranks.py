"""What runs in the ranks for test_recover.py."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import Any
from unittest import mock

import comm_core as comm
import torch
import torch.distributed as dist
from capture_ranks import capture, registered
from comm_core._control.store import store_of
from comm_core._group import reconnect
from comm_core._testing.cases import count_held
from faulty_plugins import LOG, RELEASE
from handle_ranks import events, grown_since, hear, meet, outcome, say
from leaving_ranks import SHAPES, ending, resumed
from recording_plugins import fake_capture
from recoverable_plugins import FAILURES, FAULTS, plan

#: Sizes of float32 messages: the first two backends serve one each, and torch.distributed the last.
NUMELS = (5, 50, 100)


def sums(backend: comm.Backend, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Whether sums of several sizes and dtypes are right, also as operators."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    found = []
    for numel in NUMELS:
        for dtype in (torch.float32, torch.int64):
            x = (torch.arange(numel) + rank).to(dtype)
            expected = (size * torch.arange(numel) + size * (size - 1) // 2).to(dtype)
            found.append(torch.equal(backend.all_reduce(x), expected))
            found.append(torch.equal(torch.ops.comm_core.all_reduce(x, backend.group_name), expected))
            backend.all_reduce(x, out=x)
            found.append(torch.equal(x, expected))
    return found


def call_until_it_raises(backend: comm.Backend, calls: int = 3) -> str:
    """Call as a program does that knows nothing of a failure; return the type of what it raises, "" for nothing."""
    try:
        for _ in range(calls):
            backend.all_reduce(torch.ones(NUMELS[0]))
    except BaseException as error:  # noqa: BLE001 - whatever it is
        return type(error).__name__
    return ""


def plan_of(backend: comm.Backend) -> dict[str, Any]:
    """What the handle says about its plan."""
    candidates = {item.name: (item.verdict, item.reason, item.rank) for item in backend.decision.candidates}
    return {"candidates": candidates, "name": backend.name, "text": backend.explain().split("calls so far")[0]}


def fail_and_recover(point: str, way: str, rank: int) -> dict[str, Any]:
    """One rank fails in a call; then all recover, and go on."""
    store = store_of(dist.group.WORLD)  # type: ignore[arg-type]
    comm.get_backend()  # core's own threads, and its first connections
    comm.close()
    meet("warm")
    held, keys = count_held(), store.num_keys()
    meet("counted")
    backend = comm.get_backend()
    for _ in range(3):  # the hot path knows these by now
        assert all(sums(backend))
    calls_before = sum(item.calls for item in backend.stats())
    plan("first", point, way, rank)
    LOG.clear()
    raised = call_until_it_raises(backend) if point != "check" else ending(backend.check)[0]
    found: dict[str, Any] = {"raised": raised, "recover": ending(comm.recover), "events": events()}
    found["failure"] = backend.failure
    found["plan"] = plan_of(backend)
    found["same"] = comm.get_backend() is backend
    found["sums"] = [value for _ in range(3) for value in sums(backend)]
    found["check"] = ending(backend.check)[0]
    found["counted"] = sum(item.calls for item in backend.stats()) - calls_before >= 3 * len(sums(backend))
    LOG.clear()
    comm.recover()  # nothing has failed
    found["again"] = events()
    comm.close()
    found["closed"] = events()
    meet("closed")
    found["keys"] = store.num_keys() - keys
    del backend
    gc.collect()
    found["held"] = grown_since(held)
    return found


def nothing_failed() -> dict[str, Any]:
    backend = comm.get_backend()
    LOG.clear()
    decision = backend.decision
    found: dict[str, Any] = {"ending": ending(comm.recover), "events": events(), "sums": sums(backend)}
    found["same"] = backend.decision is decision
    found["group"] = ending(lambda: comm.recover(dist.group.WORLD, timeout_s=30))
    comm.close()
    found["closed"] = ending(comm.recover)
    return found


def fail_one_after_another() -> dict[str, Any]:
    """First one backend fails, then the next, on other ranks."""
    backend = comm.get_backend()
    names = [backend.name]
    for number, name in enumerate(("first", "second")):
        plan(name, "before", "raises", number)
        call_until_it_raises(backend)
        comm.recover()
        assert all(sums(backend))
        names.append(backend.name)
    found = {"names": names, "plan": plan_of(backend)}
    comm.close()
    return found


def fail_in_two_backends() -> dict[str, Any]:
    """Two ranks fail at once, each in a backend of its own."""
    backend = comm.get_backend()
    FAULTS.clear()
    plan(*(("first", "before", "raises", 0) if dist.get_rank() == 0 else ("second", "before", "raises", 1)))
    error = outcome(lambda: backend.all_reduce(torch.ones(NUMELS[dist.get_rank()])))[0]
    comm.recover()
    found = {"error": error, "plan": plan_of(backend), "sums": sums(backend)}
    comm.close()
    return found


def a_bystander() -> dict[str, Any]:
    """One rank fails after it has sent its part; the other goes on to another backend, and waits there."""
    backend = comm.get_backend()
    plan("first", "after", "raises a CommError", 0)
    found = {"first": ending(lambda: backend.all_reduce(torch.ones(NUMELS[0])))[0]}
    if dist.get_rank():
        found["second"] = ending(lambda: backend.all_reduce(torch.ones(NUMELS[1])))[0]
    comm.recover()
    found |= {"plan": plan_of(backend), "sums": sums(backend)}
    comm.close()
    return found


def make_no_call(absent: int) -> dict[str, Any]:
    """One rank makes no call, and the others' waits end by their deadline."""
    backend = comm.get_backend()
    assert all(sums(backend))
    found: dict[str, Any] = {"call": ("ok", "", ())}
    if dist.get_rank() != absent:
        found["call"] = ending(lambda: backend.all_reduce(torch.ones(NUMELS[0])))
    found |= {"recover": ending(comm.recover), "plan": plan_of(backend), "sums": sums(backend)}
    comm.close()
    return found


def come_late(late: int) -> dict[str, Any]:
    """One rank calls `recover` only once the others have given up; then all call."""
    backend = comm.get_backend()
    plan("first", "before", "raises", 0)
    call_until_it_raises(backend)
    found: dict[str, Any] = {}
    if dist.get_rank() == late:
        hear("gave up", [rank for rank in range(dist.get_world_size()) if rank != late])
    else:
        found["first"] = ending(lambda: comm.recover(timeout_s=2))
        found["between"] = outcome(lambda: backend.all_reduce(torch.ones(2)))
        say("gave up")
    found |= {"second": ending(comm.recover), "sums": sums(backend)}
    comm.close()
    return found


def lose_a_rank(killed: int, where: str) -> dict[str, Any]:
    """One rank's process is killed; the survivors make a new group, and close the old one."""
    backend = comm.get_backend()
    assert all(sums(backend))
    survivors = [rank for rank in range(dist.get_world_size()) if rank != killed]
    plan("first", "before", "killed", killed)
    found: dict[str, Any] = {}
    if where == "a call":
        found["call"] = ending(lambda: backend.all_reduce(torch.ones(NUMELS[0])))
    else:
        plan("first", "before", "raises", survivors[0])
        call_until_it_raises(backend)
        plan("second", "connect", "killed", killed)
    found["recover"] = ending(comm.recover)
    found["later"] = ending(lambda: backend.all_reduce(torch.ones(NUMELS[0])))
    if where != "a call":
        found["again"] = ending(comm.recover)
    found["close"] = ending(comm.close)
    FAULTS.clear()
    group = dist.new_group(survivors, use_local_synchronization=True)
    another = comm.get_backend(group)
    found |= {"sums": sums(another, group), "name": another.name}
    comm.close(group)
    return found


def leave(rank: int) -> dict[str, Any]:
    """One rank is interrupted while backends connect again."""
    backend = comm.get_backend()
    plan("first", "before", "raises", 0)
    call_until_it_raises(backend)
    plan("second", "connect", "interrupted", rank)
    with resumed(rank):
        found: dict[str, Any] = {"recover": ending(comm.recover)}
    found["later"] = ending(lambda: backend.all_reduce(torch.ones(NUMELS[0])))
    meet("failed")
    found["again"] = ending(comm.recover)
    found["close"] = ending(comm.close)
    meet("closed")
    another = comm.get_backend()
    found["sums"] = sums(another)
    comm.close()
    return found


def fail_again_in_connect(rank: int, backends: tuple[str, ...] | None) -> dict[str, Any]:
    """A backend fails while it connects again, after another one or, if both are named, a misuse."""
    backend = comm.get_backend(backends=backends)
    if backends is None:
        plan("first", "before", "raises", 0)
        call_until_it_raises(backend)
    elif dist.get_rank() == 0:
        backend._serving.fail("two threads")
    plan("second", "connect", "raises", rank)
    found: dict[str, Any] = {"recover": ending(comm.recover)}
    found |= {"plan": plan_of(backend), "sums": sums(backend)}
    comm.close()
    return found


def a_named_backend_fails(backends: tuple[str, ...]) -> dict[str, Any]:
    backend = comm.get_backend(backends=backends)
    plan("first", "before", "raises", 1)
    call_until_it_raises(backend)
    found = {"recover": ending(comm.recover), "later": ending(lambda: backend.all_reduce(torch.ones(2)))}
    comm.close()
    found["sums"] = sums(comm.get_backend(backends=("second",)))
    comm.close()
    return found


def refuse(what: str) -> dict[str, Any]:
    """The group can't recover, for a reason on rank 1; nothing changes."""
    backend = comm.get_backend()
    serving: Any = backend._serving
    FAULTS.clear()
    rank = dist.get_rank()
    RELEASE.clear()
    thread = threading.Thread(target=lambda: outcome(lambda: backend.all_reduce(torch.ones(NUMELS[0]))))
    if what == "suspended":
        comm.suspend()
    elif what == "torch.distributed" and rank == 1:
        serving.fail("it broke", ("torch_distributed", "all_reduce", RuntimeError("connection reset")))
    elif what == "for good" and rank == 1:
        serving.retire("its memory is gone")
    elif what == "a thread":
        if rank == 1:
            inside = threading.Event()
            FAULTS["first", "before"] = lambda: (inside.set(), RELEASE.wait(60))
            thread.start()
            assert inside.wait(60)
        else:
            thread.start()
    elif what in ("a capture", "a stream"):
        with comm.capture() if what == "a capture" else fake_capture():
            found = {"recover": ending(comm.recover)}
        found["sums"] = sums(backend)
        comm.close()
        return found
    if what == "a thread" and rank == 0:
        thread.join(0.0)
        serving.fail("the peer hangs")  # so that it isn't in a call
        thread.join()
    found = {"recover": ending(comm.recover)}
    RELEASE.set()
    if thread.ident is not None:
        thread.join()
    comm.close()
    return found


def differ_in_debug_mode() -> dict[str, Any]:
    """The ranks make different calls, and as many as they like before they notice; no backend is to blame."""
    backend = comm.get_backend()
    assert all(sums(backend))
    numel = NUMELS[0] + dist.get_rank()
    found = {"call": ending(lambda: backend.all_reduce(torch.ones(numel)))[0], "recover": ending(comm.recover)}
    found |= {"plan": plan_of(backend), "sums": sums(backend)}
    comm.close()
    return found


def capture_before_and_after(solo: int) -> dict[str, Any]:
    """Captures, with exchanges, before and after; the number of preparations differs between the ranks before."""
    backend = comm.get_backend()
    comm.pre_capture_init(**SHAPES)
    capture((backend, 2))
    with contextlib.suppress(comm.CaptureError), fake_capture():
        for _ in range(dist.get_rank() == solo):
            comm.pre_capture_init(**SHAPES)  # counts, and sends nothing
    served = backend.decision.route("all_reduce", "eager", "cpu", "float32").backend_for(64)
    plan("second", "before", "raises", 1)
    outcome(lambda: backend.all_reduce(torch.ones(50)))
    comm.recover()
    route = backend.decision.route("all_reduce", "eager", "cpu", "float32")
    found: dict[str, Any] = {"served": [served, route.backend_for(64)]}
    comm.pre_capture_init(**SHAPES)
    found["served"].append(backend.decision.route("all_reduce", "eager", "cpu", "float32").backend_for(64))
    capture((backend, 2))
    assert dist.group.WORLD is not None
    found["registered"] = registered("first", dist.group.WORLD)
    found["sums"] = sums(backend)
    comm.close()
    return found


def recover_two_groups() -> dict[str, Any]:
    """One of two groups fails; `recover` of all groups leaves the sound one as it is."""
    world, group = comm.get_backend(), dist.new_group(range(dist.get_world_size()))
    other = comm.get_backend(group)
    decision = world.decision
    plan("first", "before", "raises", 1)
    call_until_it_raises(other)
    comm.recover()
    found = {"sound": world.decision is decision and world.name, "other": other.name}
    found |= {"sums": sums(world) + sums(other, group)}
    comm.close()
    return found


def recover_alone(kind: str) -> dict[str, Any]:
    """A group of one rank, or no process group."""
    if kind == "no process group":
        dist.destroy_process_group()
    backend = comm.get_backend()
    comm.recover()
    backend._serving.fail("two threads")
    found: dict[str, Any] = {"stopped": ending(lambda: backend.all_reduce(torch.ones(2)))[0]}
    comm.recover()
    found["sum"] = backend.all_reduce(torch.ones(2)).tolist()
    comm.suspend()
    found["suspended"] = ending(comm.recover)
    comm.close()
    comm.recover()
    return found


def recover_by_torch() -> dict[str, Any]:
    """A program for torch.distributed, on the backend "comm": its group's handle fails, and recovers."""
    group: Any = dist.group.WORLD
    backend = comm.get_backend(group)

    def summed(asynchronous: bool = False) -> bool:
        x = torch.ones(NUMELS[0])
        work = dist.all_reduce(x, async_op=asynchronous)
        if work is not None:
            work.wait()
        return bool((x == dist.get_world_size()).all())

    assert summed()
    plan("first", "before", "raises", 1)
    raised = [ending(summed)[0] for _ in range(2)]
    comm.recover(group)
    found = {"raised": raised, "sums": [summed(), summed(asynchronous=True)], "name": backend.name}
    served = {item.backend for item in backend.stats()}
    return found | {"served": sorted(served)}


def keep_sessions() -> dict[str, Any]:
    """As on GPUs: sessions stay open, and `check` hears of replays on them."""
    backend = comm.get_backend()
    plan("first", "before", "raises", 0)
    call_until_it_raises(backend)
    LOG.clear()
    with mock.patch.object(reconnect, "_may_be_in_graphs", return_value=True):
        comm.recover()
    found: dict[str, Any] = {"events": events(), "check": ending(backend.check), "sums": sums(backend)}
    FAULTS["first", "check"] = FAILURES["raises"]
    found["replayed"] = ending(backend.check)
    found["after"] = [ending(backend.check)[0], *sums(backend)]
    LOG.clear()
    comm.close()
    found["closed"] = events()
    return found
