"""What runs in the ranks for test_suspend.py."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import comm_core as comm
import recording_plugins as recording
import torch
import torch.distributed as dist
from capture_ranks import capture, events, registered
from comm_core._control.store import store_of
from faulty_plugins import LOG, RELEASE
from handle_ranks import Outcome, hear, meet, outcome, say
from leaving_ranks import SHAPES, Ending, ending, resumed
from suspendable_plugins import FAULTS, plan, raise_error

# How long a rank is ahead of another one, in seconds.
_AHEAD_S = 1.0


def sums(backend: comm.Backend) -> list[bool]:
    """Whether sums are right that "first", "second", the backend without the hooks and torch.distributed serve."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return [
        torch.equal(backend.all_reduce(torch.arange(float(numel))), size * torch.arange(float(numel)))
        for numel in (2, 20, 50, 100)
    ]


def calls(backend: comm.Backend) -> dict[str, Outcome]:
    """What calls of every kind raise."""
    x = torch.ones(4, 4)
    kinds: dict[str, Callable[[], Any]] = {
        "plain": lambda: backend.all_reduce(x),
        "in place": lambda: backend.all_reduce(x, out=x),
        "small": lambda: backend.all_reduce(x[0, :2]),
        "misaligned": lambda: backend.all_reduce(x.view(-1)[1:]),
        "empty": lambda: backend.all_reduce(x[:0]),
        "bool": lambda: backend.all_reduce(x > 0),
        "fused": lambda: backend.all_reduce_add_rms_norm(x, x, x[0]),
        "operator": lambda: torch.ops.comm_core.all_reduce(x, backend.group_name),
        "limits": backend.limits,
    }
    return {kind: outcome(call) for kind, call in kinds.items()}


def groups_of_all() -> tuple[comm.Backend, comm.Backend, dist.ProcessGroup]:
    """The world's handle, that of a second group of the same ranks, and that group."""
    group = dist.new_group(range(dist.get_world_size()))
    return comm.get_backend(), comm.get_backend(group), group


def cycle(times: int) -> dict[str, Any]:
    """Suspend and resume two groups, time after time."""
    world, other, group = groups_of_all()
    for _ in range(5):  # the hot path knows these by now
        assert all(sums(world))
    found: dict[str, Any] = {"logs": [], "sums": [], "calls": [], "while": []}
    for _ in range(times):
        LOG.clear()
        comm.suspend()
        if dist.get_rank() == 0:
            comm.suspend()  # does nothing
        found["while"].append(
            {
                "same": comm.get_backend() is world and comm.get_backend(group) is other,
                "check": outcome(world.check),
                "failure": world.failure,
                # These wait for no rank.
                "prepare": outcome(lambda: comm.pre_capture_init(**SHAPES)) if dist.get_rank() == 0 else None,
                "capture": outcome(capture) if dist.get_rank() == 0 else None,
                "texts": (repr(world), world.explain().splitlines()[0]),
            }
        )
        found["calls"] += [calls(world), calls(other)]
        found["logs"].append(events())
        LOG.clear()
        comm.resume()
        found["sums"].append((sums(world), sums(other)))
        found["logs"].append(events())
        if dist.get_rank() == 0:
            comm.resume()  # does nothing
        comm.pre_capture_init(**SHAPES)
        capture((world, 2), (other, 2))
    assert dist.group.WORLD is not None
    found["registered"] = [registered("first", dist.group.WORLD), registered("first", group)]
    found["texts"] = (repr(world), world.explain().splitlines()[0])
    LOG.clear()
    comm.close()
    found["closed"] = events()
    return found


def one_group() -> dict[str, Any]:
    """Suspend one of two groups; then all, and resume all."""
    world, other, group = groups_of_all()
    LOG.clear()
    comm.suspend(group)
    found: dict[str, Any] = {
        "world": sums(world),
        "other": calls(other),
        "prepare": outcome(lambda: comm.pre_capture_init(**SHAPES)),
        "captures": [outcome(lambda: capture((world, 2))) for _ in range(2)],
    }
    comm.suspend()
    found["both"] = [calls(world), calls(other)]
    comm.resume(group)
    found["resumed"] = sums(other)
    comm.close(group)
    comm.resume()
    capture((world, 2))
    found["at last"] = sums(world)
    comm.suspend(group)  # it has no handle
    comm.resume(group)
    found["events"] = [event for event in events() if "suspend" in event or "resume" in event]
    return found


def fail(hook: str, name: str, point: str, way: str, rank: int) -> dict[str, Any]:
    """One rank fails in a hook of the world's; another group is there too."""
    world, other, group = groups_of_all()
    if hook == "resume":
        comm.suspend()
    plan(name, point, way, rank)
    LOG.clear()
    say("go")
    hear("go", range(dist.get_world_size()))
    with resumed(rank):
        found: dict[str, Any] = {"ending": ending(getattr(comm, hook))}
    found["events"] = events()
    with contextlib.suppress(comm.CommError):  # one rank was interrupted before the second group's turn, or is gone
        found["other"] = sums(other) if hook == "resume" and way != "killed" else []
    found["calls"] = calls(world)
    found["texts"] = (world.failure, repr(world))
    if way != "killed":
        meet("all failed")
        found["later"] = [ending(lambda: comm.suspend(dist.group.WORLD)), ending(lambda: comm.resume(dist.group.WORLD))]
    LOG.clear()
    RELEASE.set()
    found["close"] = [ending(comm.close), ending(comm.close)]
    found["closed"] = sorted(events())
    if way != "killed":
        meet("closed")
        again = comm.get_backend()
        found["again"] = sums(again)
        comm.close()
    del group
    return found


def absent(hook: str, late: int) -> dict[str, Any]:
    """One rank doesn't come, or only once the others have failed; then all come."""
    backend = comm.get_backend(timeout_s=4)
    if hook == "resume":
        comm.suspend()
    LOG.clear()
    found: dict[str, Any] = {}
    if dist.get_rank() == late:
        with recording.fake_capture():
            found["first"] = ending(getattr(comm, hook))
        hear("failed", [rank for rank in range(dist.get_world_size()) if rank != late])
    else:
        found["first"] = ending(getattr(comm, hook))
        say("failed")
    found["between"] = sums(backend) if hook == "suspend" else calls(backend)["plain"]
    meet("all failed")
    getattr(comm, hook)()
    if hook == "suspend":
        comm.resume()
    found["events"] = events()
    found["sums"] = sums(backend)
    comm.close()
    return found


def checked(rank: int) -> dict[str, Any]:
    """A kernel's error on one rank, for which no caller has asked."""
    backend = comm.get_backend()
    plan("first", "check", "raises", rank)
    LOG.clear()
    found: dict[str, Any] = {"first": ending(comm.suspend), "refused": backend.failure is not None}
    found["second"] = ending(comm.suspend)
    found["events"] = events()
    comm.close()
    return found


def dropped(rank: int) -> dict[str, Any]:
    """Suspend a group of which a backend was dropped that had served calls."""
    backend = comm.get_backend()
    plan("first", "pre_capture_init", "raises", rank)
    comm.pre_capture_init(**SHAPES)
    LOG.clear()
    comm.suspend()
    comm.resume()
    found: dict[str, Any] = {"verdict": backend.decision.candidate("first").verdict, "sums": sums(backend)}
    found["events"] = events()
    comm.close()
    return found


def interrupted_before_hooks(rank: int) -> dict[str, Any]:
    """One rank is interrupted before any hook runs."""
    backend = comm.get_backend()
    plan("first", "check", "interrupted", rank)
    LOG.clear()
    found: dict[str, Any] = {"ending": ending(comm.suspend), "events": events(), "calls": calls(backend)}
    found["close"] = ending(comm.close)
    return found


def in_a_call(rank: int) -> dict[str, Any]:
    """One rank suspends while another thread of its is in a call."""
    backend = comm.get_backend()
    inside = threading.Event()
    FAULTS.clear()
    RELEASE.clear()

    def linger() -> None:
        inside.set()
        assert RELEASE.wait(60)

    FAULTS["first", "sum"] = linger
    results: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: results.append(outcome(lambda: backend.all_reduce(torch.ones(2)).tolist()))
    )
    thread.start()
    assert inside.wait(60)
    if dist.get_rank() != rank:
        RELEASE.set()
        hear("called", [rank])
        thread.join()
    else:
        thread_of_peer = threading.Thread(target=lambda: (time.sleep(_AHEAD_S), say("called"), RELEASE.set()))
        thread_of_peer.start()
    found: dict[str, Any] = {"suspend": ending(comm.suspend)}
    thread.join()
    found["call"] = results[0]
    found["later"] = outcome(lambda: backend.all_reduce(torch.ones(2))) if dist.get_rank() == rank else None
    comm.close()
    return found


def close_suspended() -> dict[str, Any]:
    """Close a suspended group, twice; then get a new handle."""
    store = store_of(dist.group.WORLD)  # type: ignore[arg-type]
    before = set(threading.enumerate())  # other tests ran in this process
    comm.get_backend()
    comm.close()
    meet("all closed first")
    keys = store.num_keys()
    meet("all counted")
    backend = comm.get_backend()
    comm.suspend()
    comm.resume()
    comm.suspend()
    LOG.clear()
    comm.close()
    found: dict[str, Any] = {"closed": events(), "call": calls(backend)["plain"]}
    meet("all closed")
    found["keys"] = store.num_keys() - keys
    del backend
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread not in before]
    found["threads"] = [name for name in threads if "check" not in name]
    again = comm.get_backend()
    found["again"] = sums(again)
    comm.close()
    return found


def alone() -> dict[str, Any]:
    """A group of one rank, and no world at all."""
    found: dict[str, Any] = {}
    for name in ("world of one", "no world"):
        backend = comm.get_backend()
        comm.suspend()
        comm.suspend()
        found[name] = [calls(backend), outcome(lambda: comm.pre_capture_init(**SHAPES)), outcome(capture)]
        comm.resume()
        comm.resume()
        found[name] += [sums(backend), outcome(capture)]
        comm.suspend()
        comm.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return found


def in_a_capture() -> dict[str, Any]:
    backend = comm.get_backend()
    LOG.clear()
    found: dict[str, Any] = {}
    for hook in ("suspend", "resume"):
        with recording.fake_capture():
            found[f"{hook}, stream"] = outcome(getattr(comm, hook))
        with comm.capture():
            found[f"{hook}, block"] = outcome(getattr(comm, hook))
    found["events"] = [event for event in events() if "suspend" in event]
    found["sums"] = sums(backend)
    comm.close()
    return found


def simple() -> dict[str, Any]:
    """Suspend and resume a group by whatever serves it."""
    backend = comm.get_backend()
    LOG.clear()
    comm.suspend()
    refused = calls(backend)
    comm.resume()
    found = {"calls": refused, "sums": sums(backend), "events": events()}
    comm.close()
    return found


@contextlib.contextmanager
def _blaming(hook: str, culprit: int) -> Iterator[None]:
    """One rank's hook fails a little later than the others', which have waited for it by means of their own."""

    def fail_late() -> None:
        time.sleep(_AHEAD_S)
        raise_error()

    def blame() -> None:
        raise comm.CommTimeoutError("a peer didn't come", (culprit,))

    FAULTS.clear()
    FAULTS["first", hook] = fail_late if dist.get_rank() == culprit else blame
    yield
    FAULTS.clear()


def blame(hook: str, culprit: int) -> Ending:
    comm.get_backend()
    if hook == "resume":
        comm.suspend()
    with _blaming(hook, culprit):
        found = ending(getattr(comm, hook))
    comm.close()
    return found
