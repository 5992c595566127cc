"""`context.control`: when a plugin may talk to the other ranks, and in which stage. Threads are the ranks here."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from comm_core._control.channel import SessionChannel
from comm_core._control.stage import Stage, StageAbortedError
from comm_core.errors import CaptureError, CommError
from control_ranks import WatchedStore, group_of, in_stage, in_threads, outcome, server, start

if TYPE_CHECKING:
    from comm_core._control.store import Control


@pytest.mark.parametrize("make", [dist.HashStore, server])
def test_no_later_stage_gets_a_message_of_a_thread_that_was_left_behind(make: Callable[[], dist.Store]) -> None:
    members = group_of(make(), 2)
    channel, over = SessionChannel(), threading.Event()

    def left_behind() -> set[str]:
        words = set()
        while not over.is_set():
            try:
                channel.all_gather("left behind")
            except StageAbortedError as error:
                words.add(error.reason)
            time.sleep(0.0001)
        return words

    def talk(member: Control) -> list[Any]:
        return [in_stage(member, f"step {n}", lambda stage: stage.all_gather(member.rank)) for n in range(30)]

    with channel.open_stage(members[0], "connect") as stage:
        late = start(left_behind)
        stage.abort("no time left")
    assert in_threads(members, talk) == [[[0, 1]] * 30] * 2
    over.set()
    assert outcome(late) == {"no time left"}


def test_the_channel_is_closed_outside_of_collective_hooks() -> None:
    channel = SessionChannel()
    for call in (channel.barrier, lambda: channel.all_gather(1), lambda: channel.agree(ok=True)):
        with pytest.raises(CommError, match="inside Collective hooks"):
            call()


def test_a_vote_is_a_bool_and_reads_as_one() -> None:
    (member,) = group_of(dist.HashStore(), 1)
    channel = SessionChannel()
    with channel.open_stage(member, "connect"):
        assert channel.agree(ok=True)
        assert not channel.agree(False, "no room")
        wrong: Any = None
        with pytest.raises(TypeError, match="expected a bool as ok; got NoneType"):
            channel.agree(wrong)


def test_the_channel_never_waits_while_a_stream_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    (member,) = group_of(dist.HashStore(), 1)
    channel = SessionChannel()
    with channel.open_stage(member, "connect") as stage:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(CaptureError, match="no rank can wait for the others while a CUDA stream captures"):
                channel.barrier()
        assert stage.aborted is None
        assert channel.all_gather(1) == [1]


@pytest.mark.parametrize("make", [dist.HashStore, server])
@pytest.mark.parametrize("number", range(4))
def test_a_thread_that_outlives_its_stage_never_waits_in_the_store(make: Callable[[], dist.Store], number: int) -> None:
    """The other ranks may leave, and delete the stage's keys, between any two of its operations."""
    store = make()
    aborted, operations = threading.Event(), itertools.count()

    def delete(*_: object) -> None:
        if aborted.is_set() and next(operations) == number:
            store.clone().delete_key(verdict)  # type: ignore[attr-defined]

    members = group_of([WatchedStore(store, delete), store], 2, timeout_s=1.0)
    verdict = f"{members[0].prefix}/step/0/verdict"
    outliving = start(lambda: in_stage(members[0], "step", lambda stage: stage.barrier()))
    while not store.check([f"{members[0].prefix}/step/0/arrived"]):
        time.sleep(0.001)
    Stage(members[1], "step").abort("gone")
    aborted.set()
    assert isinstance(outcome(outliving), StageAbortedError)
