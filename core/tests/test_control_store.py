"""What the control channel leaves in the store, asks of it, and does without it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from comm_core._control import store as store_module
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError
from comm_core._control.store import Control
from comm_core.errors import CommError, CommTimeoutError, NegotiationError
from control_ranks import (
    NEVER_S,
    PATIENCE_S,
    Hold,
    WatchedStore,
    group_of,
    in_stage,
    in_threads,
    outcome,
    server,
    start,
)
from store_ranks import Deleting

SHORT_S = 0.1


STORES: dict[str, Callable[[Path], dist.Store]] = {
    "hash": lambda _: dist.HashStore(),
    "tcp": lambda _: server(),
    "tcp without libuv": lambda _: dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False
    ),
    "file": lambda folder: dist.FileStore(str(folder / "store"), -1),
    "prefixes": lambda _: dist.PrefixStore("outer", dist.PrefixStore("inner", dist.HashStore())),
    "python": lambda _: Deleting(dist.HashStore()),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> dist.Store:
    return STORES[request.param](tmp_path)


def gather(member: Control, name: str, value: Any = None, timeout_s: float | None = None) -> list[Any]:
    return in_stage(member, name, lambda stage: stage.all_gather(value), timeout_s)


def finish(members: list[Control]) -> None:
    assert in_threads(members, Control.finish) == [None] * len(members)


# --- incarnations ---


def test_all_ranks_join_one_incarnation_each_time(store: dist.Store) -> None:
    seen: list[set[str]] = [set(), set(), set()]
    prefixes = set()
    for _ in range(5):
        members = [Control(store, rank, (0, 1, 2), PATIENCE_S) for rank in range(3)]
        in_threads(members, lambda member: member.join(seen[member.rank]))
        (prefix,) = {member.prefix for member in members}
        prefixes.add(prefix)
        assert in_threads(members, lambda member: gather(member, "step", member.rank)) == [[0, 1, 2]] * 3
        finish(members)
    assert len(prefixes) == 5
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 5


def test_a_late_rank_joins_the_try_that_the_others_founded_and_reads_how_it_ended() -> None:
    store, seen = dist.HashStore(), [set[str](), set[str]()]
    finish(group_of(store, 2, seen=seen))
    early = Control(store, 0, (0, 1), SHORT_S)
    early.join(seen[0])
    with pytest.raises(StageTimeoutError) as missed:
        gather(early, "step")
    early.finish()
    late = Control(store, 1, (0, 1), PATIENCE_S)
    late.join(seen[1])
    assert late.prefix == early.prefix
    with pytest.raises(StageTimeoutError) as read:
        gather(late, "step")
    assert str(read.value) == str(missed.value)


def test_after_two_failed_tries_the_ranks_meet_in_a_third() -> None:
    store, seen = dist.HashStore(), [set[str](), set[str]()]
    for _ in range(2):
        alone = Control(store, 0, (0, 1), SHORT_S)
        alone.join(seen[0])
        with pytest.raises(StageTimeoutError):
            gather(alone, "step", "stale")
        alone.finish()
    late = Control(store, 1, (0, 1), PATIENCE_S)
    late.join(seen[1])
    with pytest.raises(StageTimeoutError):
        gather(late, "step", "stale")
    late.finish()
    members = group_of(store, 2, seen=seen)
    assert in_threads(members, lambda member: gather(member, "step", member.rank)) == [[0, 1]] * 2


def test_groups_on_one_store_do_not_hear_each_other() -> None:
    store = server()
    groups = {name: group_of(dist.PrefixStore(name, store), 3) for name in ("tp", "pp", "ep")}

    def talk(name: str, member: Control) -> list[list[Any]]:
        return [gather(member, f"step {number}", [name, member.rank]) for number in range(20)]

    talking = {
        (name, member.rank): start(lambda name=name, member=member: talk(name, member))
        for name, members in groups.items()
        for member in members
    }
    for (name, _), future in talking.items():
        assert outcome(future) == [[[name, rank] for rank in range(3)]] * 20


# --- keys ---


def steps_that_succeed(member: Control) -> None:
    for number in range(3):
        gather(member, f"step {number}")


def a_rank_fails_first(member: Control) -> None:
    with contextlib.suppress(ValueError, StageAbortedError), Stage(member, "step") as stage:
        if member.rank == 0:
            raise ValueError
        stage.barrier()
    gather(member, "next")


def a_rank_fails_after_the_others_left(member: Control) -> None:
    with contextlib.suppress(ValueError), Stage(member, "step") as stage:
        stage.barrier()
        if member.rank == 0:
            raise ValueError


def a_rank_comes_too_late(member: Control) -> None:
    with contextlib.suppress(StageTimeoutError), Stage(member, "step", SHORT_S) as stage:
        if member.rank == 0:
            time.sleep(2 * SHORT_S)
        stage.barrier()
    gather(member, "next")


def all_fail(member: Control) -> None:
    for number in range(3):
        with contextlib.suppress(ValueError), Stage(member, f"step {number}"):
            raise ValueError


def nothing_at_all(member: Control) -> None:
    pass


@pytest.mark.parametrize(
    "work",
    [
        steps_that_succeed,
        a_rank_fails_first,
        a_rank_fails_after_the_others_left,
        a_rank_comes_too_late,
        all_fail,
        nothing_at_all,
    ],
)
@pytest.mark.parametrize("last", [0, 2])
def test_once_all_have_left_only_the_incarnation_stays(store: dist.Store, work: Any, last: int) -> None:
    before = store.num_keys()
    members = group_of(store, 3)
    assert in_threads(members, work) == [None] * 3
    finish([member for member in members if member.rank != last])
    assert store.num_keys() > before + 1
    members[last].finish()
    assert store.check(["comm_core/incarnation"])
    assert store.num_keys() == before + 1


def test_a_rank_that_leaves_with_an_error_of_all_waits_until_they_have_left(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may end then, and take the store along, before they have read the error."""
    monkeypatch.setattr(store_module, "_LEAVE_S", PATIENCE_S)
    members = group_of(store, 3)
    first, second = (start(lambda member=member: member.finish(NegotiationError())) for member in members[:2])
    while not store.check([f"{members[0].prefix}/left"]) or store.add(f"{members[0].prefix}/left", 0) < 2:
        time.sleep(0.001)
    assert not first.done()
    assert not second.done()
    members[2].finish(NegotiationError())
    assert outcome(first) is None
    assert outcome(second) is None


@pytest.mark.parametrize("error", [None, ValueError(), CommTimeoutError("absent"), NegotiationError()])
def test_a_rank_that_leaves_does_not_wait_for_ever(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_LEAVE_S", SHORT_S if isinstance(error, NegotiationError) else NEVER_S)
    member, _ = group_of(dist.HashStore(), 2)
    assert outcome(start(lambda: member.finish(error))) is None


def test_a_late_rank_takes_the_keys_of_a_failed_try_with_it() -> None:
    store = dist.HashStore()
    early, late = group_of(store, 2, timeout_s=SHORT_S)
    for member in (early, late):
        with pytest.raises(StageTimeoutError):
            gather(member, "step")
        member.finish()
    assert store.num_keys() == 1


def test_hundreds_of_exchanges_keep_the_number_of_keys_bounded() -> None:
    store, counts = dist.HashStore(), set()

    def talk(member: Control) -> None:
        for number in range(4):
            with Stage(member, f"step {number}") as stage:
                for _ in range(75):
                    stage.barrier()
                    counts.add(store.num_keys())

    assert in_threads(group_of(store, 4), talk) == [None] * 4
    # The incarnation; a verdict, a counter and four messages of the exchange that ended, of the one before while it is
    # being cleared, and of the one that others have begun.
    assert 1 + 6 <= max(counts) <= 1 + 3 * 6


def test_a_thread_left_behind_deletes_nothing_of_a_later_stage() -> None:
    """The last to arrive clears the exchange before; until it comes to that, its rank may be two stages further."""
    store = dist.HashStore()
    publishing = Hold(lambda name, key: name == "multi_get" and "/first/1/" in key[0])
    reading = Hold(lambda name, key: name == "compare_set" and key.endswith("/second/0/verdict"))
    members = group_of([WatchedStore(store, publishing), WatchedStore(store, reading)], 2)
    in_threads(members, lambda member: gather(member, "zeroth"))
    with Stage(members[0], "first") as stage, Stage(members[1], "first") as other:
        begun = start(other.barrier)
        stage.barrier()
        assert outcome(begun) is None
        waiting = start(other.barrier)
        while not store.check([f"{members[0].prefix}/first/1/arrived"]):
            time.sleep(0.001)
        left_behind = start(stage.barrier)
        publishing.wait()
        stage.abort("no time left")
        assert isinstance(outcome(waiting), StageAbortedError)
    slow = start(lambda: gather(members[1], "second", 1))
    while not store.check([f"{members[0].prefix}/second/0/arrived"]):
        time.sleep(0.001)
    assert gather(members[0], "second", 0) == [0, 1]
    reading.wait()
    publishing.release()
    assert isinstance(outcome(left_behind), StageAbortedError)
    reading.release()
    assert outcome(slow) == [0, 1]


# --- how often the store is asked ---


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_the_store_is_asked_in_proportion_to_the_ranks(world_size: int) -> None:
    asked: Counter[str] = Counter()
    members = group_of(WatchedStore(dist.HashStore(), lambda name, _: asked.update([name])), world_size)
    in_threads(members, lambda member: gather(member, "step"))
    finish(members)
    assert asked["add"] == 2 * world_size
    assert asked.total() - asked["check"] <= 10 * world_size  # the number of polls follows the time
    asked.clear()
    members = group_of(WatchedStore(dist.HashStore(), lambda name, _: asked.update([name])), world_size)
    in_threads(members, lambda member: [gather(member, f"step {number}") for number in range(20)])
    assert asked.total() - asked["check"] <= 20 * 6 * world_size


# --- a store that is gone ---


# Forks for each line that it reads, since importing torch takes seconds; the child serves a TCP store.
SERVERS = """
import os, signal, sys, torch.distributed as dist
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
        print(os.getpid(), store.port, flush=True)
        signal.pause()
    os.waitpid(child, 0)
    print('ended', flush=True)
"""


@dataclasses.dataclass
class Server:
    """A TCP store in a process of its own, and a client of it."""

    pid: int
    store: dist.TCPStore
    parent: subprocess.Popen[str]
    is_alive: bool = True

    def kill(self) -> None:
        if not self.is_alive:
            return
        self.is_alive = False
        os.kill(self.pid, signal.SIGKILL)
        assert self.parent.stdout is not None
        assert self.parent.stdout.readline() == "ended\n"


@pytest.fixture(scope="module")
def servers() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVERS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@contextlib.contextmanager
def server_elsewhere(servers: subprocess.Popen[str]) -> Iterator[Server]:
    assert servers.stdin is not None
    assert servers.stdout is not None
    servers.stdin.write("another\n")
    servers.stdin.flush()
    pid, port = map(int, servers.stdout.readline().split())
    timeout = timedelta(seconds=PATIENCE_S)
    server = Server(pid, dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout), servers)
    try:
        yield server
    finally:
        server.kill()


def assert_lost(members: list[Control], words: str) -> None:
    """Every further call says so at once, and a rank that leaves isn't kept."""
    for number in range(2):
        for error in in_threads(members, lambda member, n=number: gather(member, f"after {n}")):
            assert isinstance(error, CommError)
            assert words in str(error)
    finish(members)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_store_that_died_is_named(servers: subprocess.Popen[str], waiting: bool) -> None:
    with server_elsewhere(servers) as server:
        store = server.store
        members = group_of(store, 3)
        talking: list[concurrent.futures.Future[list[Any]]] = []
        if waiting:
            talking = [start(lambda member=member: gather(member, "step")) for member in members[:2]]
            arrived = store.clone()
            while not arrived.check([f"{members[0].prefix}/step/0/0", f"{members[0].prefix}/step/0/1"]):
                time.sleep(0.001)
        server.kill()
        for error in map(outcome, talking):
            assert isinstance(error, CommError)
            assert str(error).startswith("step: the job's store can't be reached any more")
        assert_lost(members, "the job's store can't be reached any more")
        with pytest.raises(CommError, match="joining the group: the job's store can't be reached"):
            members[0].join(set())


def test_a_store_that_does_not_answer_is_named(servers: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with server_elsewhere(servers) as server:
        members = group_of(server.store, 2)
        monkeypatch.setattr(store_module, "_STORE_S", SHORT_S)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(CommTimeoutError, match=r"step: the job's store gave no answer") as caught:
            gather(members[0], "step", timeout_s=SHORT_S)
        assert caught.value.ranks == ()
        assert_lost(members[:1], "the job's store gave no answer")
