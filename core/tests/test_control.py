"""The control channel: exchanges, votes, and how a stage ends for all ranks alike. Threads are the ranks here."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from comm_core._control.stage import MESSAGE_NBYTES, Stage, StageAbortedError, StageTimeoutError
from comm_core.context import Agreement
from comm_core.errors import CommTimeoutError
from control_ranks import NEVER_S, Hold, WatchedStore, group_of, in_stage, in_threads, outcome, server, start

if TYPE_CHECKING:
    from comm_core._control.store import Control

SHORT_S = 0.2


@pytest.fixture(params=["hash", "tcp"])
def store(request: pytest.FixtureRequest) -> dist.Store:
    """With a prefix, as torch gives each group one."""
    return dist.PrefixStore("group", server() if request.param == "tcp" else dist.HashStore())


def barriers(count: int, member: Control, name: str = "step", timeout_s: float | None = None) -> None:
    def call(stage: Stage) -> None:
        for _ in range(count):
            stage.barrier()

    in_stage(member, name, call, timeout_s)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_exchange_brings_every_value_to_every_rank(store: dist.Store, world_size: int) -> None:
    def value(rank: int) -> dict[str, Any]:
        return {"rank": rank, "text": 'ä "quoted" \u2028 \U0001f600 \ud800', "list": [None, True, 1.5, []]}

    members = group_of(store, world_size)
    got = in_threads(members, lambda member: in_stage(member, "step", lambda s: s.all_gather(value(member.rank))))
    assert got == [[value(rank) for rank in range(world_size)]] * world_size


def test_no_exchange_gets_a_message_of_another(store: dist.Store) -> None:
    dawdling = random.Random(0)  # noqa: S311 - delays

    def talk(member: Control) -> list[list[list[int]]]:
        got = []
        for number in range(5):
            with Stage(member, f"step {number}") as stage:
                for sequence in range(10):
                    time.sleep(dawdling.random() * 0.001)
                    got.append(stage.all_gather([number, sequence, member.rank]))
        return got

    want = [[[number, sequence, rank] for rank in range(3)] for number in range(5) for sequence in range(10)]
    assert in_threads(group_of(store, 3), talk) == [want] * 3


def test_a_barrier_holds_until_the_last_has_come(store: dist.Store) -> None:
    came: list[int] = []

    def wait(member: Control) -> int:
        time.sleep(0.02 * member.rank)
        came.append(member.rank)
        barriers(1, member)
        return len(came)

    assert in_threads(group_of(store, 4), wait) == [4] * 4


def test_a_vote_carries_the_reasons_of_those_against(store: dist.Store) -> None:
    ballots = [(True, ""), (False, "no memory"), (True, "unused"), (False, ""), (False, "\U0001f600" * 10**5)]

    def vote(member: Control) -> Agreement:
        return in_stage(member, "step", lambda stage: stage.agree(*ballots[member.rank]))

    first, *others = in_threads(group_of(store, 5), vote)
    assert isinstance(first, Agreement)
    assert not first.ok
    assert {rank: reason[:9] for rank, reason in first.reasons.items()} == {1: "no memory", 3: "", 4: "\U0001f600" * 9}
    assert others == [first] * 4


def test_a_vote_that_all_are_for(store: dist.Store) -> None:
    votes = in_threads(group_of(store, 3), lambda member: in_stage(member, "step", lambda stage: stage.agree(ok=True)))
    assert votes == [Agreement(ok=True, reasons={})] * 3


def test_calls_that_do_not_match_abort_the_stage(store: dist.Store) -> None:
    def talk(stage: Stage, rank: int) -> None:
        stage.barrier()
        stage.agree(ok=True) if rank == 2 else stage.all_gather(None)

    members = group_of(store, 4)
    errors = in_threads(members, lambda member: in_stage(member, "step", lambda stage: talk(stage, member.rank)))
    for error in errors:
        assert isinstance(error, StageAbortedError)
        assert error.rank == 2
        assert error.reason == "exchanges don't match: agree here, all_gather on other ranks"


def endless() -> list[Any]:
    nested: list[Any] = []
    nested.append(nested)
    return nested


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("x" * (MESSAGE_NBYTES - 1), id="a byte too long"),  # with its quotes
        pytest.param("\U0001f600" * (MESSAGE_NBYTES // 12 + 1), id="too long once escaped"),
        pytest.param({1, 2}, id="a set"),
        pytest.param(b"bytes", id="bytes"),
        pytest.param({"a": float("nan")}, id="no number"),
        pytest.param({(1, 2): 3}, id="a tuple as key"),
        pytest.param(endless(), id="a list in itself"),
    ],
)
def test_a_message_that_cannot_be_sent_is_refused_before_anything_is(message: Any) -> None:
    operations: list[str] = []
    watched = WatchedStore(dist.HashStore(), lambda name, _: operations.append(name))
    members = group_of(watched, 2, timeout_s=SHORT_S)
    joined = len(operations)
    with Stage(members[0], "step") as stage:
        with pytest.raises((TypeError, ValueError)):
            stage.all_gather(message)
        assert len(operations) == joined
        assert stage.aborted is None


def test_after_a_refused_message_the_exchange_still_works(store: dist.Store) -> None:
    longest = "x" * (MESSAGE_NBYTES - 2)

    def talk(stage: Stage) -> Any:
        with pytest.raises(ValueError, match=r"65537 bytes; the limit is 65536"):
            stage.all_gather(longest + "x")
        return stage.all_gather(longest)

    got = in_threads(group_of(store, 2), lambda member: in_stage(member, "step", talk))
    assert got == [[longest, longest]] * 2


def test_the_verdict_of_many_ranks_is_compressed() -> None:
    verdicts: list[int] = []

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "compare_set" and arguments[0].endswith("/verdict") and not arguments[1]:
            verdicts.append(len(arguments[2]))

    def facts(rank: int) -> list[str]:
        return [f"link {peer} of GPU-{rank:08x}: 18 x NVLink" for peer in range(50)]

    members = group_of(WatchedStore(dist.HashStore(), watch), 64)
    got = in_threads(members, lambda member: in_stage(member, "step", lambda s: s.all_gather(facts(member.rank))))
    assert got == [[facts(rank) for rank in range(64)]] * 64
    assert len(verdicts) == 1
    assert verdicts[0] < 64 * 2000 // 4


@pytest.mark.parametrize(("before", "inner"), [(0, False), (1, False), (3, False), (0, True), (1, True)])
def test_a_rank_that_raises_releases_the_others_at_once(store: dist.Store, before: int, inner: bool) -> None:
    def talk(member: Control) -> None:
        with Stage(member, "step", NEVER_S) as stage:
            for _ in range(before):
                stage.barrier()
            if inner:  # as of `context.group`: its exchange deletes the keys of the one before
                in_stage(member, "inner", lambda inner: inner.barrier())
            if member.rank == 1:
                raise KeyError("weights")
            stage.barrier()

    errors = in_threads(group_of(store, 3), talk)
    assert isinstance(errors[1], KeyError)
    for error in (errors[0], errors[2]):
        assert isinstance(error, StageAbortedError)
        assert not isinstance(error, CommTimeoutError)
        assert (str(error), error.rank) == ("step: rank 1 failed: KeyError: 'weights'", 1)


def test_a_rank_that_raises_after_the_last_exchange_harms_no_later_stage(store: dist.Store) -> None:
    def talk(member: Control) -> Any:
        try:
            with Stage(member, "step") as stage:
                stage.barrier()
                if member.rank == 1:
                    raise ValueError("late")
        except ValueError:
            pass
        return in_stage(member, "next", lambda stage: stage.all_gather(member.rank))

    assert in_threads(group_of(store, 3), talk) == [[0, 1, 2]] * 3


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UnspeakableError(), ValueError("x" * 10**6)])
def test_any_exception_that_leaves_the_block_aborts_the_stage(store: dist.Store, error: BaseException) -> None:
    def talk(member: Control) -> None:
        with Stage(member, "step") as stage:
            if member.rank == 0:
                raise error
            stage.barrier()

    mine, theirs = in_threads(group_of(store, 2), talk)
    assert mine is error
    assert isinstance(theirs, StageAbortedError)
    assert type(error).__name__ in theirs.reason
    assert len(str(theirs)) < 5000


def test_every_call_of_an_aborted_stage_raises_the_same_reason(store: dist.Store) -> None:
    operations: list[str] = []
    watched = WatchedStore(store, lambda name, _: operations.append(name))
    members = group_of([store, watched], 2)

    def stubborn(stage: Stage) -> list[str]:
        words = []
        for call in (stage.barrier, stage.barrier, lambda: stage.all_gather(1), lambda: stage.agree(ok=True)):
            with pytest.raises(StageAbortedError) as caught:
                call()
            words.append((str(caught.value), len(operations)))
        return words

    with pytest.raises(ValueError, match="boo"), Stage(members[0], "step"):
        raise ValueError("boo")
    words = in_stage(members[1], "step", stubborn)
    # None but the first asks the store.
    assert words == [("step: rank 0 failed: ValueError: boo", words[0][1])] * 4


def test_an_abort_releases_this_ranks_own_thread_and_the_late_rank(store: dist.Store) -> None:
    waits = Hold(lambda name, _: name == "check")
    members = group_of([WatchedStore(store, waits), store], 2)
    with Stage(members[0], "step") as stage:
        blocked = start(stage.barrier)
        waits.wait()
        waits.release()
        error = stage.abort("no time left")
    late = outcome(start(lambda: barriers(1, members[1])))
    assert str(error) == "step: rank 0 failed: no time left"
    for other in (outcome(blocked), late):
        assert isinstance(other, StageAbortedError)
        assert str(other) == str(error)


def test_the_second_abort_returns_the_first(store: dist.Store) -> None:
    members = group_of(store, 2)
    errors = [in_stage(member, "step", lambda stage, m=member: stage.abort(f"by {m.rank}")) for member in members]
    assert [error.reason for error in errors] == ["by 0", "by 0"]


def test_how_others_ended_a_stage_can_be_read_without_waiting(store: dist.Store) -> None:
    first, second = group_of(store, 2, timeout_s=SHORT_S)
    assert Stage(second, "step").peek() is None
    ends = [Stage(first, "step").abort("no room"), outcome(start(lambda: barriers(1, first, "next")))]
    assert [type(error) for error in ends] == [StageAbortedError, StageTimeoutError]
    for name, end in zip(("step", "next"), ends, strict=True):
        stage = Stage(second, name)
        found = stage.peek()
        assert (type(found), str(found)) == (type(end), str(end))
        assert not stage.begun
        # The first exchange has the same end.
        error = outcome(start(stage.barrier))
        assert (type(error), str(error)) == (type(end), str(end))
        assert stage.begun


def test_a_lost_store_is_no_end_of_a_stage(store: dist.Store) -> None:
    def cut_off(name: str, _: object) -> None:
        if name == "check":
            raise RuntimeError("connection reset")

    (member,) = group_of(WatchedStore(store, cut_off), 1)
    assert Stage(member, "step").peek() is None


@pytest.mark.parametrize("aborting", [1, 3])
def test_all_ranks_stop_at_the_same_exchange_for_the_same_reason(aborting: int) -> None:
    dice = random.Random(aborting)  # noqa: S311 - delays
    members = group_of(dist.HashStore(), 3)
    for number in range(60):
        delays = [dice.random() * 0.003 for _ in members]

        def talk(stage: Stage) -> tuple[int, str]:
            count = 0
            try:
                while True:
                    assert stage.all_gather(count) == [count] * 3
                    count += 1
            except StageAbortedError as error:
                return count, error.reason

        def take_part(
            member: Control, name: str = f"step {number}", delays: list[float] = delays
        ) -> tuple[Any, str | None]:
            with Stage(member, name) as stage:
                talking, error = start(lambda: talk(stage)), None
                if member.rank < aborting:
                    time.sleep(delays[member.rank])
                    error = stage.abort(f"by {member.rank}").reason
                return outcome(talking), error

        ends = in_threads(members, take_part)
        (first, _), *_ = ends
        assert ends == [(first, first[1] if rank < aborting else None) for rank in range(3)]


def test_a_deadline_racing_the_last_rank_ends_alike_for_all() -> None:
    dice = random.Random(0)  # noqa: S311 - delays
    members = group_of(dist.HashStore(), 3)
    for number in range(60):
        late_s = 0.004 + dice.random() * 0.002

        def talk(member: Control, name: str = f"step {number}", late_s: float = late_s) -> str:
            time.sleep(late_s if member.rank == 2 else 0)
            try:
                barriers(1, member, name, 0.005 if member.rank < 2 else NEVER_S)
            except StageTimeoutError as error:
                return str(error)
            return "in time"

        assert len(set(in_threads(members, talk))) == 1


@pytest.mark.parametrize("of_the_stage", [True, False])
def test_a_missed_deadline_names_the_absent_also_to_themselves(store: dist.Store, of_the_stage: bool) -> None:
    members = group_of(store, 4, timeout_s=NEVER_S if of_the_stage else SHORT_S)
    deadline = SHORT_S if of_the_stage else None
    early = in_threads([members[0], members[2]], lambda member: barriers(1, member, timeout_s=deadline))
    late = in_threads([members[1], members[3]], lambda member: barriers(1, member, timeout_s=NEVER_S))
    for error in (*early, *late):
        assert isinstance(error, StageTimeoutError)
        assert isinstance(error, TimeoutError)
        assert error.ranks == (1, 3)
        assert error.reason == "ranks 1, 3 didn't come in time"
        assert str(error) == str(early[0])


def test_a_stage_names_the_ranks_that_another_thread_waits_for(store: dist.Store) -> None:
    members = group_of(store, 3)
    with Stage(members[0], "step") as stage:
        assert stage.pending_ranks() == ()
        waiting = [start(lambda stage=stage: stage.barrier()), start(lambda: barriers(1, members[2], "step"))]
        while not store.check([f"{members[0].prefix}/step/0/{rank}" for rank in (0, 2)]):
            time.sleep(0.001)
        assert stage.pending_ranks() == (1,)
        assert outcome(start(lambda: barriers(1, members[1], "step"))) is None
        assert [outcome(one) for one in waiting] == [None, None]
        assert stage.pending_ranks() == ()


def test_the_deadline_of_a_stage_covers_all_its_exchanges(store: dist.Store) -> None:
    def talk(member: Control) -> None:
        with Stage(member, "step", SHORT_S) as stage:
            stage.barrier()
            if member.rank == 1:
                time.sleep(2 * SHORT_S)
            stage.barrier()

    assert [type(error) for error in in_threads(group_of(store, 2), talk)] == [StageTimeoutError] * 2


def test_a_rank_that_dies_with_the_verdict_in_its_hands_is_a_missed_deadline(store: dist.Store) -> None:
    publishing = Hold(lambda name, key: name == "compare_set" and key.endswith("/verdict"))
    members = group_of([store, WatchedStore(store, publishing)], 2, timeout_s=SHORT_S)
    waiting = start(lambda: barriers(1, members[0]))
    while not store.check([f"{members[0].prefix}/step/0/arrived"]):
        time.sleep(0.001)
    dying = start(lambda: barriers(1, members[1]))
    publishing.wait()
    error = outcome(waiting)
    publishing.release()
    assert isinstance(error, StageTimeoutError)
    assert (error.reason, error.ranks) == ("the rank that came last didn't come in time", ())
    assert str(outcome(dying)) == str(error)


def test_people_read_the_jobs_ranks_too(store: dist.Store) -> None:
    members = group_of(store, 3, timeout_s=SHORT_S, global_ranks=(0, 5, 2))
    with pytest.raises(StageTimeoutError) as caught:
        barriers(1, members[0])
    assert caught.value.ranks == (1, 2)
    assert str(caught.value) == "step: ranks 1 (5 in the job), 2 didn't come in time, says rank 0"
    with pytest.raises(ValueError, match="boo"), Stage(members[1], "next"):
        raise ValueError("boo")
    with pytest.raises(StageAbortedError) as failed:
        barriers(1, members[2], "next")
    assert failed.value.rank == 1
    assert str(failed.value) == "next: rank 1 (5 in the job) failed: ValueError: boo"
