"""What runs in the ranks for test_capture.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core._group.states import all_states
from faulty_plugins import LOG, RELEASE
from handle_ranks import Outcome, hear, meet, outcome, say, summed
from recording_plugins import fake_capture


def events(name: str = "") -> list[str]:
    """What happened to the sessions of `name`, or to all of them, since `LOG` was cleared; calls aside."""
    return [
        event if name else f"{backend} {event}"
        for backend, _, event in LOG
        if event != "all_reduce" and backend.startswith(name)
    ]


def record(backend: comm.Backend, numel: int = 5) -> None:
    """Make a call that the current stream captures."""
    with fake_capture():
        backend.all_reduce(torch.ones(numel))


def registered(name: str, group: dist.ProcessGroup) -> list[list[list[int]]]:
    """What the backend's session of a group registered."""
    (state,) = (state for state in all_states() if state.group is group)
    (session,) = (session.value for session in state.sessions if session.plugin.name == name)
    found: list[list[list[int]]] = session.registered
    return found


def capture(*calls: tuple[comm.Backend, int]) -> None:
    with comm.capture():
        for backend, numel in calls:
            record(backend, numel)


def once_a_session() -> dict[str, Any]:
    """Two groups of the same ranks, one of them under two names, one made late; two captures, the second nested."""
    world = comm.get_backend()
    assert comm.get_backend(dist.group.WORLD) is world
    LOG.clear()
    capture((world, 5))
    first = events()
    group = dist.new_group(range(dist.get_world_size()))
    late = comm.get_backend(group)
    LOG.clear()
    with comm.capture():
        record(world, 7)
        with comm.capture():
            record(late, 8)
        assert summed(late)  # not captured: a warm-up
        inside = events()
    second = events()
    assert dist.group.WORLD is not None
    return {
        "first": first,
        "inside": inside,
        "second": second,
        "world": registered("first", dist.group.WORLD),
        "late": registered("first", group),
    }


def not_all_capture() -> dict[str, Any]:
    """4 ranks: {0, 1} captures, {2, 3} doesn't, rank 0 captures something of its own without a call besides."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[dist.get_rank() // 2]
    assert isinstance(mine, dist.ProcessGroup)
    world, pair = comm.get_backend(), comm.get_backend(mine)
    LOG.clear()
    if dist.get_rank() == 0:
        capture()
    if dist.get_rank() < 2:
        capture((pair, 4))
    elsewhere = events()
    # All are still in step.
    capture((world, 3), (pair, 2))
    assert dist.group.WORLD is not None
    return {
        "elsewhere": elsewhere,
        "world": registered("first", dist.group.WORLD),
        "pair": registered("first", mine),
    }


def raise_inside(failing: int, tries: int = 1, late: bool = False) -> dict[str, Any]:
    """One rank's captures fail by an error of the caller's, `tries` times, at once; then all capture together."""
    world = comm.get_backend()
    LOG.clear()

    def attempt() -> None:
        with comm.capture():
            record(world)
            if dist.get_rank() == failing:
                raise ZeroDivisionError("my own")

    if dist.get_rank() != failing and late:
        hear("failed", [failing])
    outcomes = [outcome(attempt) for _ in range(tries)]
    log = events()
    say("failed")
    capture((world, 9))
    assert dist.group.WORLD is not None
    return {"outcomes": outcomes, "events": log, "registered": registered("first", dist.group.WORLD)}


def fail_without_calls(failing: int, tries: int, late: bool) -> dict[str, Any]:
    """All capture without calls, one rank's captures fail, before the others' or at once; then all capture calls."""
    world = comm.get_backend()
    LOG.clear()

    def attempt() -> None:
        with comm.capture():
            if dist.get_rank() == failing:
                raise ZeroDivisionError("my own")

    if dist.get_rank() != failing and late:
        hear("failed", [failing])
    outcomes = [outcome(attempt) for _ in range(tries)]
    log = events()
    say("failed")
    heard = [] if dist.get_rank() == failing else [outcome(lambda: capture((world, 5))) for _ in range(tries)]
    capture((world, 9))
    assert dist.group.WORLD is not None
    found = registered("first", dist.group.WORLD)
    return {"outcomes": outcomes, "events": log, "heard": heard, "registered": found}


def capture_alone_then_fail(failing: int, solo: int, tries: int) -> dict[str, Any]:
    """One rank captures alone, without calls; then all capture, and one of them fails at first; then all go on."""
    world = comm.get_backend()
    if dist.get_rank() == solo:
        capture()

    def attempt() -> None:
        with comm.capture():
            record(world, 8)
            if dist.get_rank() == failing:
                raise ZeroDivisionError("my own")

    outcomes = [outcome(attempt) for _ in range(tries)]
    for numel in (4, 2, 1):
        capture((world, numel))
    assert dist.group.WORLD is not None
    return {"outcomes": outcomes, "registered": registered("first", dist.group.WORLD)}


def capture_in_two_threads(at: str) -> dict[str, Any]:
    """A thread enters a capture while this one's is being entered, or left."""
    RELEASE.set()
    world = comm.get_backend()
    LOG.clear()
    if at == "entry":
        RELEASE.clear()

    def record_more() -> None:
        with comm.capture():
            record(world, 6)

    other = threading.Thread(target=record_more)
    # Releases whoever lingers, once the other thread has had its time to come to the capture.
    timer = threading.Timer(0.5, RELEASE.set)

    def go_on() -> None:
        time.sleep(0.2)
        other.start()
        timer.start()

    starter = threading.Thread(target=go_on)
    if at == "entry":
        starter.start()
    with comm.capture():
        if at == "entry":
            starter.join()
            other.join()
        record(world, 5)
        if at == "exit":
            RELEASE.clear()
            starter.start()
    starter.join()
    other.join()
    assert dist.group.WORLD is not None
    return {"events": events("first"), "registered": registered("first", dist.group.WORLD)}


def leave_before_an_inner_one() -> dict[str, Any]:
    """A capture is left while one inside it, in another thread, goes on; the next one doesn't depend on that."""
    world = comm.get_backend()
    LOG.clear()
    inside, go_on = threading.Event(), threading.Event()
    inner: list[Outcome] = []

    def linger() -> None:
        with comm.capture():
            inside.set()
            assert go_on.wait(60)

    def leave() -> None:
        with comm.capture():
            thread.start()
            assert inside.wait(60)
            record(world, 5)

    thread = threading.Thread(target=lambda: inner.append(outcome(linger)))
    outer = outcome(leave)
    capture((world, 7))
    go_on.set()
    thread.join()
    assert dist.group.WORLD is not None
    return {"outer": outer, "inner": inner[0], "registered": registered("first", dist.group.WORLD)}


def skip_one(absent: int) -> list[Outcome]:
    """One rank doesn't enter a capture in which the others record calls; then all capture, time after time."""
    backend = comm.get_backend(timeout_s=4)
    found = [outcome(lambda: capture((backend, 3)))] if dist.get_rank() != absent else []
    meet("skipped")
    for numel in (4, 5):
        found.append(outcome(lambda: capture((backend, numel))))  # noqa: B023
        meet(f"captured {numel}")
    return found


def fail_then_capture() -> dict[str, Any]:
    """A capture of three sessions, of which a plugin's fault may break one; then another."""
    world = comm.get_backend()
    group = dist.new_group(range(dist.get_world_size()))
    pair = comm.get_backend(group)
    LOG.clear()
    first = outcome(lambda: capture((world, 5), (pair, 5)))
    log = events()
    second = outcome(lambda: capture((world, 6), (pair, 6)))
    assert dist.group.WORLD is not None
    return {
        "first": first,
        "events": log,
        "second": second,
        "registered": [registered("first", dist.group.WORLD), registered("first", group)],
    }


def overlap(groups: Sequence[Sequence[int]]) -> list[tuple[list[int], list[list[list[int]]]]]:
    """Groups that share ranks, recorded together in three captures; of the second only one group is part."""
    made = [(list(ranks), dist.new_group(ranks)) for ranks in groups]
    mine = [(ranks, group) for ranks, group in made if isinstance(group, dist.ProcessGroup)]
    handles = [comm.get_backend(group) for _, group in mine]
    capture(*((handle, 4) for handle in handles))
    if dist.get_rank() in groups[0]:
        capture((handles[0], 5))
    capture(*((handle, 6) for handle in handles))
    return [(ranks, registered("first", group)) for ranks, group in mine]


def pass_through() -> dict[str, Any]:
    """A group that was closed, one that was destroyed, and a group of one."""
    size = dist.get_world_size()
    closed, destroyed = dist.new_group(range(size)), dist.new_group(range(size))
    single = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    handles = [comm.get_backend(group) for group in (closed, destroyed, single)]
    comm.close(closed)
    dist.destroy_process_group(destroyed)
    LOG.clear()
    with comm.capture():
        alone = handles[2].all_reduce(torch.ones(3))
    return {"events": events(), "alone": alone.tolist()}


def lose_inside() -> dict[str, Any]:
    """A group is destroyed while it is captured."""
    group = dist.new_group(range(dist.get_world_size()))
    handle = comm.get_backend(group)
    world = comm.get_backend()
    LOG.clear()

    def lose() -> None:
        with comm.capture():
            record(world)
            dist.destroy_process_group(group)
            assert handle is not comm.get_backend()

    first = outcome(lose)
    meet("lost")
    return {"first": first, "second": outcome(lambda: capture((world, 2)))}


def go_wrong() -> dict[str, Outcome]:
    """What isn't to be done while a graph is captured."""
    backend = comm.get_backend()
    found: dict[str, Outcome] = {}
    shapes = {"max_tokens": 1, "hidden_size": 1, "dtype": torch.float32}
    group = dist.new_group(range(dist.get_world_size()))
    with fake_capture():
        found["enter"] = outcome(lambda: capture((backend, 1)))
        found["get"] = outcome(lambda: comm.get_backend(group))
        found["close"] = outcome(comm.close)
        found["prepare"] = outcome(lambda: comm.pre_capture_init(**shapes))
    with comm.capture():
        found["close inside"] = outcome(comm.close)
        found["prepare inside"] = outcome(lambda: comm.pre_capture_init(**shapes))

    def crossed() -> None:
        context = comm.capture()
        context.__enter__()
        with fake_capture():
            context.__exit__(None, None, None)

    found["leave"] = outcome(crossed)
    # None of it has closed or broken anything.
    found["then"] = outcome(lambda: capture((backend, 3)))
    found["sum"] = outcome(lambda: summed(backend))
    return found


def capture_without_waiting(absent: int) -> Outcome:
    """One rank records nothing."""
    backend = comm.get_backend(timeout_s=4)
    if dist.get_rank() == absent:
        hear("failed", [rank for rank in range(dist.get_world_size()) if rank != absent])
        # The capture of which it was no part is over, and it finds its way into the next.
        found = outcome(capture)
    else:
        found = outcome(lambda: capture((backend, 3)))
        say("failed")
    meet("over")
    capture((backend, 4))
    return found


def leave_late(late: int) -> list[Outcome]:
    """One rank leaves a capture after the others' deadline; then all capture together."""
    backend = comm.get_backend(timeout_s=4)

    def linger() -> None:
        with comm.capture():
            record(backend, 3)
            if dist.get_rank() == late:
                hear("failed", [rank for rank in range(dist.get_world_size()) if rank != late])

    found = [outcome(linger)]
    say("failed")
    meet("over")
    return [*found, outcome(lambda: capture((backend, 4)))]
