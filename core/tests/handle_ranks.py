"""What runs in the ranks for test_handles.py: what callers do with handles, rightly and wrongly."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import comm_core as comm
import faulty_plugins as faulty
import torch
import torch.distributed as dist
from comm_core._group import states
from comm_core._testing.cases import count_held, warnings_of_core
from harness import side_store

#: ("ok", who serves) or (an error's type, its text).
Outcome = tuple[str, str]
# How long threads may take to end, in seconds.
_RELEASE_S = 20.0


def outcome(call: Callable[[], Any]) -> Outcome:
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
        return type(error).__name__, str(error)
    return "ok", result.name if isinstance(result, comm.Backend) else repr(result)


def say(what: str) -> None:
    """Tell the other ranks, behind comm_core's back."""
    side_store().set(f"{what}/{dist.get_rank()}", "")


def hear(what: str, ranks: Iterable[int]) -> None:
    """Wait until these ranks have said it."""
    side_store().wait([f"{what}/{rank}" for rank in ranks], timedelta(seconds=60))


def meet(what: str) -> None:
    say(what)
    hear(what, range(dist.get_world_size()))


def summed(backend: comm.Backend, group: dist.ProcessGroup | None = None) -> bool:
    size = dist.get_world_size(group)
    total = backend.all_reduce(torch.full((5,), float(dist.get_rank(group) + 1)))
    return torch.equal(total, torch.full((5,), size * (size + 1) / 2))


def events() -> list[str]:
    """What happened to the sessions since `faulty.LOG` was cleared, calls aside."""
    return [event for _, _, event in faulty.LOG if event != "all_reduce"]


def grown_since(before: dict[str, int]) -> dict[str, int]:
    """What the process holds more than before, once threads had time to end; segments may be another program's."""
    end = time.monotonic() + _RELEASE_S
    while True:
        held = count_held()
        grown = {kind: held[kind] - count for kind, count in before.items() if "segments" not in kind}
        grown = {kind: by for kind, by in grown.items() if by > 0}
        if not grown or time.monotonic() > end:
            return grown
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(0.1)


def get_named_then_any(backends: tuple[str, ...]) -> tuple[Outcome, list[Any], Outcome, bool]:
    faulty.LOG.clear()
    named = outcome(lambda: comm.get_backend(backends=backends))
    tried = [log[0] for log in faulty.LOG if log[2] == "connect"]
    comm.close()
    backend = comm.get_backend()
    return named, tried, ("ok", backend.name), summed(backend)


def get_differently_then_alike(names: list[tuple[str, ...] | None]) -> tuple[Outcome, Outcome]:
    mine = names[dist.get_rank()]
    return outcome(lambda: comm.get_backend(backends=mine)), outcome(comm.get_backend)


def get_twice_and_listen() -> tuple[list[str], Any, bool]:
    with warnings_of_core() as texts:
        backend = comm.get_backend()
        assert comm.get_backend() is backend
    return texts, backend.decision.to_json(), summed(backend)


def get_then_clear_the_environment() -> tuple[Outcome, Outcome]:
    first = outcome(comm.get_backend)
    for name in [name for name in os.environ if name.startswith("COMM_CORE_")]:
        del os.environ[name]
    return first, outcome(comm.get_backend)


def get_wrongly() -> dict[str, Outcome]:
    """A fault on one rank raises there and delays no other rank."""
    backend = comm.get_backend(timeout_s=60)
    assert comm.get_backend(dist.group.WORLD, timeout_s=60) is backend
    calls: dict[str, Callable[[], Any]] = {
        "other timeout": comm.get_backend,
        "other backends": lambda: comm.get_backend(timeout_s=60, backends=["second"]),
        "a string": lambda: comm.get_backend(backends="second"),
        "no name": lambda: comm.get_backend(backends=()),
        "no time": lambda: comm.get_backend(timeout_s=0),
        "no number": lambda: comm.get_backend(timeout_s=float("nan")),
        "no group": lambda: comm.get_backend("tp"),  # type: ignore[arg-type]
    }
    found = {name: outcome(call) for name, call in calls.items()} if dist.get_rank() == 0 else {}
    assert summed(backend)
    comm.close()
    return found


def get_late(late: int) -> tuple[Outcome, tuple[int, ...], Outcome]:
    """One rank calls only after the others' deadline; then all call again."""
    if dist.get_rank() == late:
        hear("failed", (rank for rank in range(dist.get_world_size()) if rank != late))
    try:
        comm.get_backend(timeout_s=1)
    except comm.CommTimeoutError as error:
        first, absent = str(error), error.ranks
    say("failed")
    meet("all ranks failed")
    return ("CommTimeoutError", first), absent, outcome(lambda: comm.get_backend(timeout_s=60))


def get_until_all_are_there(late: int) -> bool:
    """Every rank calls again and again; one begins once the others have failed."""
    if dist.get_rank() == late:
        hear("failed", (rank for rank in range(dist.get_world_size()) if rank != late))
    for _ in range(10):
        with contextlib.suppress(comm.CommTimeoutError):
            return summed(comm.get_backend(timeout_s=3))
        say("failed")
    return False


def close_twice() -> dict[str, Any]:
    faulty.LOG.clear()
    backend = comm.get_backend()
    comm.close()
    closed = events()
    x = torch.ones(4)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: backend.all_reduce(x),
        "misaligned": lambda: backend.all_reduce(x[1:]),
        "empty": lambda: backend.all_reduce(x[:0]),
        "fused": lambda: backend.all_reduce_add_rms_norm(x.reshape(1, 4), x.reshape(1, 4), x),
        "check": backend.check,
    }
    if dist.get_rank() == 0:  # local no-ops
        comm.close()
        comm.close(dist.group.WORLD)
    again = comm.get_backend()
    fresh = again is not backend and summed(again)
    comm.close()
    return {"events": closed, "calls": {name: outcome(call) for name, call in calls.items()}, "fresh": fresh}


def get_while_another_thread_closes() -> dict[str, Any]:
    """Close a handle while another thread waits for the lock of its state."""
    faulty.LOG.clear()
    first = comm.get_backend()
    (state,) = states.all_states()
    new: list[comm.Backend] = []
    thread = threading.Thread(target=lambda: new.append(comm.get_backend()))
    with state.lock:
        thread.start()
        time.sleep(0.2)
        comm.close()
    thread.join()
    (second,) = new
    found = {"new": second is not first, "kept": comm.get_backend() is second, "sum": summed(second)}
    comm.close()
    return found | {"closed": outcome(lambda: second.all_reduce(torch.ones(4)))[0], "events": events()}


def close_all_groups() -> list[Outcome]:
    groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0, 1])]
    backends = [comm.get_backend(group) for group in groups]
    comm.close()
    return [outcome(lambda b=backend: b.all_reduce(torch.ones(4))) for backend in backends]  # type: ignore[misc]


def destroy_before_close(closes: bool) -> dict[str, Any]:
    """Destroy the job's group first; then close it, or go straight on to a new one."""
    faulty.LOG.clear()
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    backend = comm.get_backend()
    found: dict[str, Any] = {}
    with warnings_of_core() as texts:
        dist.destroy_process_group()
        if closes:
            comm.close(group)
        found["get"] = outcome(lambda: comm.get_backend(group))
        dist.init_process_group("gloo", store=dist.PrefixStore("again", side_store()), rank=rank, world_size=size)
        another = comm.get_backend()
    return found | {
        "warnings": texts,
        "events": events(),
        "call": outcome(lambda: backend.all_reduce(torch.ones(4))),
        "another": summed(another),
    }


def close_without(killed: int) -> dict[str, Any]:
    """One rank's process is killed while all hold a handle; what happened from then on."""
    backend = comm.get_backend(timeout_s=4)
    meet("got it")
    faulty.LOG.clear()
    if dist.get_rank() == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    with warnings_of_core() as texts:
        comm.close()
        comm.close()
    return {"warnings": texts, "events": events(), "call": outcome(lambda: backend.all_reduce(torch.ones(4)))}


def overlap(groups: list[list[int]]) -> list[tuple[Any, bool] | Outcome]:
    """Get, use and close groups that share ranks, in one order; for each what this rank found."""
    made = [dist.new_group(group) for group in groups]
    members = [group for group in made if isinstance(group, dist.ProcessGroup)]
    found: list[tuple[Any, bool] | Outcome] = []
    for group in made:
        if isinstance(group, dist.ProcessGroup):
            backend = comm.get_backend(group)
            found.append((backend.decision.to_json(), summed(backend, group)))
        else:
            found.append(outcome(lambda g=group: comm.get_backend(g)))  # type: ignore[misc]
    assert all(summed(comm.get_backend(group), group) for group in members)
    for group in members:
        comm.close(group)
    return found


def alone(kind: str) -> dict[str, Any]:
    """The handle of a group of one, or of a process without groups."""
    group = None
    if kind == "no process group":
        meet("all are connected")
        dist.destroy_process_group()
    elif kind == "a group of one":
        group = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    backend = comm.get_backend(group)
    x = torch.arange(6.0)
    y = backend.all_reduce(x)
    weight, residual = torch.ones(3), torch.zeros(2, 3)
    normed, total = backend.all_reduce_add_rms_norm(x.reshape(2, 3), residual, weight)
    found = {
        "copied": torch.equal(x, y) and y.data_ptr() != x.data_ptr(),
        "in place": backend.all_reduce(x, out=x) is x,
        "normed": torch.allclose(normed, torch.nn.functional.rms_norm(x.reshape(2, 3), (3,), weight, 1e-6)),
        "total": torch.equal(total, x.reshape(2, 3)),
        "name": backend.name,
        "refused": outcome(lambda: backend.all_reduce(torch.eye(2).to_sparse()))[0],
        "same": comm.get_backend(group) is backend,
    }
    comm.close(group)
    return found | {
        "closed": outcome(lambda: backend.all_reduce(x))[0],
        "again": outcome(lambda: comm.get_backend(group)),
    }


def alone_before_and_after_the_world() -> dict[str, Any]:
    """The operators' default is this process alone again once the world is gone."""
    store, rank, size = side_store().clone(), dist.get_rank(), dist.get_world_size()
    meet("all are connected")
    dist.destroy_process_group()
    x, call = torch.ones(4), torch.ops.comm_core.all_reduce
    single = comm.get_backend()
    before = call(x)
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=size)
    comm.get_backend()
    together = call(x)
    comm.close(dist.group.WORLD)
    dist.destroy_process_group()
    same = comm.get_backend() is single
    return {"same": same, "sums": [y[0].item() for y in (before, together, call(x))]}
