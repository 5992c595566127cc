"""`comm.suspend` and `comm.resume`: all ranks together, time after time, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import suspend_ranks
import suspendable_plugins
from faulty_plugins import Good, install_kind
from harness import DEAD

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks

RANK = 1
# Where a hook or a rank hangs, the others wait for as long, in seconds.
SHORT_S = 4
SHORT = {"COMM_CORE_CONTROL_TIMEOUT_S": str(SHORT_S), "COMM_CORE_CONNECT_TIMEOUT_S": str(SHORT_S)}
LONG = {"COMM_CORE_CONTROL_TIMEOUT_S": "60", "COMM_CORE_CONNECT_TIMEOUT_S": "60"}
SUSPENDED = "is suspended. Call comm.resume(group) on all its ranks first"


@pytest.fixture
def path(tmp_path: Path) -> list[Path]:
    """Two backends that can be suspended, and one that can't."""
    return [
        install_kind(tmp_path / "first", suspendable_plugins.Suspends, "first", 300),
        install_kind(tmp_path / "second", suspendable_plugins.SuspendsMore, "second", 200),
        install_kind(tmp_path / "third", Good, "third", 100),
    ]


def check_refused(calls: dict[str, Any], text: str) -> None:
    assert len(calls) == 9
    for name, (kind, words) in calls.items():
        assert kind == "CommError", name
        assert text in words, name


def test_two_groups_sum_again_and_again(ranks: Ranks, path: list[Path]) -> None:
    times, world_size = 3, 3
    for found in ranks.run(suspend_ranks.cycle, times, world_size=world_size, path=[path] * world_size, env=LONG):
        assert found["sums"] == [([True] * 4, [True] * 4)] * times
        changes = [f"{name} {hook}" for hook in ("suspend", "resume") for _ in range(2) for name in ("first", "second")]
        assert found["logs"] == [changes[:4], changes[4:]] * times
        assert len(found["calls"]) == 2 * times
        for calls in found["calls"]:
            check_refused(calls, SUSPENDED)
        for state in found["while"]:
            assert (state["same"], state["check"], state["failure"]) == (True, ("ok", "None"), None)
            if state["capture"]:
                assert state["prepare"][0] == "CommError"
                assert state["prepare"][1].endswith(SUSPENDED)
                assert state["capture"][0] == "CaptureError"
                assert state["capture"][1].endswith(SUSPENDED)
            assert all(", suspended" in text for text in state["texts"])
        assert not any("suspended" in text for text in found["texts"])
        # Rank 0 alone tried to prepare and to capture meanwhile, and no later call of the others paired with that.
        assert found["registered"] == [[[[2]] * world_size] * times] * 2
        assert found["closed"] == [f"{name} close orderly=True" for name in ("first", "second", "third")] * 2


def test_one_of_two_groups_is_suspended(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(suspend_ranks.one_group, path=[path] * 2, env=LONG):
        assert found["world"] == found["resumed"] == found["at last"] == [True] * 4
        for calls in (found["other"], *found["both"]):
            check_refused(calls, SUSPENDED)
        assert found["prepare"][0] == "CommError"
        assert SUSPENDED in found["prepare"][1]
        for kind, text in found["captures"]:
            assert kind == "CaptureError"
            assert SUSPENDED in text
        hooks = ["suspend", "suspend", "resume", "resume"]
        assert found["events"] == [f"{name} {hook}" for hook in hooks for name in ("first", "second")]


# The two hooks run in the same way; so each kind of failure is tested in one of them, or in both at different places.
@pytest.mark.parametrize(
    ("hook", "name", "later", "way", "words"),
    [
        ("suspend", "first", "", "raises", "rank 1: MemoryError: no room for 12 GiB"),
        ("resume", "second", ", later", "raises", "rank 1: MemoryError: no room for 12 GiB"),
        ("suspend", "first", ", later", "exits", "rank 1: RuntimeError: {hook} of first raised SystemExit: no licence"),
        # Here the other rank waits in its hook: its deadline is the same, and says for whom it waits.
        ("suspend", "first", "", "hangs", f"rank {{rank}}: {{hook}} of first hasn't returned after {SHORT_S} s"),
        ("resume", "second", ", later", "hangs", f"rank 1: {{hook}} of second hasn't returned after {SHORT_S} s"),
        ("resume", "first", "", "stopped", "rank 1 didn't come in time"),
        ("suspend", "first", ", later", "interrupted", "rank 1: KeyboardInterrupt"),
    ],
)
def test_a_hook_that_fails_on_one_rank_stops_the_handle_on_all(
    ranks: Ranks, path: list[Path], hook: str, name: str, later: str, way: str, words: str
) -> None:
    env = SHORT if way in ("hangs", "stopped", "interrupted") else LONG
    results = ranks.run(suspend_ranks.fail, hook, name, hook + later, way, RANK, path=[path] * 2, env=env)
    for rank, found in enumerate(results):
        if way == "interrupted" and rank == RANK:
            assert found["ending"][0] == "KeyboardInterrupt"
            check_refused(found["calls"], "ended early: KeyboardInterrupt. This handle refuses further calls")
            assert hook in found["calls"]["plain"][1]
        else:
            first = results[0]
            speaker = 0 if "it waits for rank 1" in first["ending"][1] else 1
            check_failed(
                found, first, hook, name, words.format(hook=hook, rank=speaker), timeout=way in ("hangs", "stopped")
            )
        assert found["texts"][0]
        assert "suspended" not in found["texts"][1]
        for kind, text, _ in found["later"]:
            assert kind == "CommError"
            assert "This handle refuses further calls" in text
        assert [kind for kind, _, _ in found["close"]] == ["ok", "ok"]
        # The world's, not in order; the second group had its turn, unless this rank was interrupted before.
        assert [f"{name} close orderly=False" in found["closed"] for name in ("first", "second", "third")] == [True] * 3
        assert len(found["closed"]) == 6
        assert found["again"] == [True] * 4


def check_failed(found: dict[str, Any], first: dict[str, Any], hook: str, name: str, words: str, timeout: bool) -> None:
    """One error on all ranks, which names the backend and has the failing rank's words."""
    assert found["ending"] == first["ending"]
    kind, text, _ = found["ending"]
    assert kind == ("CommTimeoutError" if timeout else "CommError")
    assert text.startswith(f"backend '{name}' of group '")
    assert f"failed in {hook}: {words}" in text
    assert text.endswith("This handle refuses further calls; close it on all ranks and get a new one")
    assert found["texts"][0] == text
    assert {words for _, words in found["calls"].values()} == {text}


def test_a_rank_that_is_killed_in_a_hook_stops_the_handle_on_the_others(ranks: Ranks, path: list[Path]) -> None:
    hook = "suspend"
    results = ranks.run(
        suspend_ranks.fail, hook, "first", hook, "killed", 2, world_size=3, path=[path] * 3, env=SHORT, dying=[2]
    )
    assert results.pop(2) == DEAD
    for found in results:
        check_failed(found, results[0], hook, "first", "rank 2 didn't come in time", timeout=True)
        assert found["ending"][2] == (2,)
        assert [kind for kind, _, _ in found["close"]] == ["ok", "ok"]
        assert "first close orderly=False" in found["closed"]


@pytest.mark.parametrize("hook", ["suspend", "resume"])
def test_a_rank_that_doesnt_come_changes_nothing(ranks: Ranks, path: list[Path], hook: str) -> None:
    results = ranks.run(suspend_ranks.absent, hook, RANK, path=[path] * 2, env=LONG)
    for rank, found in enumerate(results):
        kind, text, absent = found["first"]
        if rank == RANK:
            assert kind == "CaptureError"  # nothing was sent
        else:
            assert (kind, absent) == ("CommTimeoutError", (RANK,))
            assert f"can't be {hook.removesuffix('e')}ed: rank 1 didn't come in time. No memory was" in text
        if hook == "suspend":
            assert found["between"] == [True] * 4
        else:
            assert found["between"][1].endswith(SUSPENDED)
        assert found["events"][-2:] == ["first resume", "second resume"]
        assert len(found["events"]) == (4 if hook == "suspend" else 2)
        assert found["sums"] == [True] * 4


def test_a_dropped_backend_is_suspended_too(ranks: Ranks, path: list[Path]) -> None:
    # Graphs captured before it was dropped may replay on its session.
    for found in ranks.run(suspend_ranks.dropped, RANK, path=[path] * 2, env=LONG):
        assert found["verdict"] == "failed"
        assert found["sums"] == [True] * 4
        assert found["events"] == [f"{name} {hook}" for hook in ("suspend", "resume") for name in ("first", "second")]


def test_an_error_of_a_kernel_isnt_lost(ranks: Ranks, path: list[Path]) -> None:
    for rank, found in enumerate(ranks.run(suspend_ranks.checked, RANK, path=[path] * 2, env=LONG)):
        for kind, text, _ in (found["first"], found["second"]):
            assert kind == "CommError"
            assert "can't be suspended: rank " in text
            assert "backend 'first' of group" in text
            assert "failed in check: no room for 12 GiB" in text
            assert text.endswith("No memory was given back")
        assert rank != RANK or found["refused"]
        assert found["events"] == []


def test_a_rank_that_is_interrupted_before_the_hooks_stops_the_handle_on_all(ranks: Ranks, path: list[Path]) -> None:
    results = ranks.run(suspend_ranks.interrupted_before_hooks, RANK, path=[path] * 2, env=LONG)
    assert results[RANK]["ending"][0] == "KeyboardInterrupt"
    kind, text, _ = results[0]["ending"]
    assert kind == "CommError"
    assert "can't be suspended: rank 1: KeyboardInterrupt. This handle refuses further calls" in text
    for found in results:
        assert found["events"] == []
        check_refused(found["calls"], "This handle refuses further calls")
        assert found["close"][0] == "ok"


def test_a_group_isnt_suspended_in_a_call_of_another_thread(ranks: Ranks, path: list[Path]) -> None:
    for rank, found in enumerate(ranks.run(suspend_ranks.in_a_call, RANK, path=[path] * 2, env=LONG)):
        kind, text, _ = found["suspend"]
        assert kind == "CommError"
        assert "can't be suspended: rank 1: two threads used the handle of group" in text
        assert found["call"] == ("ok", "[2.0, 2.0]")
        if rank == RANK:
            assert found["later"][0] == "CommError"
            assert "two threads" in found["later"][1]


def test_a_suspended_group_is_closed_like_another(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(suspend_ranks.close_suspended, path=[path] * 2, env=LONG):
        assert found["closed"] == [f"{name} close orderly=True" for name in ("first", "second", "third")]
        assert "its handle was closed" in found["call"][1]
        assert found["keys"] == 0
        assert found["threads"] == []
        assert found["again"] == [True] * 4


def test_a_group_of_one_rank_is_suspended_without_an_exchange(ranks: Ranks) -> None:
    (found,) = ranks.run(suspend_ranks.alone, world_size=1)
    assert len(found) == 2
    for calls, prepare, captured, sums, captured_later in found.values():
        assert {kind for kind, _ in calls.values()} == {"CommError"}
        assert all(SUSPENDED in text for _, text in calls.values())
        assert (prepare[0], captured[0]) == ("CommError", "CaptureError")
        assert sums == [True] * 4
        assert captured_later == ("ok", "None")


def test_a_capture_refuses_both(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(suspend_ranks.in_a_capture, path=[path] * 2, env=LONG):
        assert found.pop("events") == []
        assert found.pop("sums") == [True] * 4
        assert len(found) == 4
        for name, (kind, text) in found.items():
            assert kind == "CaptureError"
            assert f"comm.{name.split(',')[0]} can't" in text


@pytest.mark.parametrize(
    ("minimal", "debug"), [(False, "1"), (True, "0")], ids=["torch.distributed", "a plugin without connect"]
)
def test_any_group_can_be_suspended(ranks: Ranks, tmp_path: Path, minimal: bool, debug: str) -> None:
    folder = install_kind(tmp_path, suspendable_plugins.Minimal, "minimal", 300) if minimal else tmp_path  # type: ignore[arg-type]
    for found in ranks.run(suspend_ranks.simple, path=[[folder]] * 2, env=LONG | {"COMM_CORE_DEBUG": debug}):
        check_refused(found["calls"], SUSPENDED)
        assert found["sums"] == [True] * 4
        assert found["events"] == (["minimal suspend [0, 1]", "minimal resume [0, 1]"] if minimal else [])


@pytest.mark.parametrize("hook", ["suspend", "resume"])
def test_the_cause_is_reported_not_its_consequence(ranks: Ranks, path: list[Path], hook: str) -> None:
    endings = ranks.run(suspend_ranks.blame, hook, RANK, world_size=3, path=[path] * 3, env=LONG)
    assert len(set(endings)) == 1
    kind, text, _ = endings[0]
    assert kind == "CommError"
    assert f"failed in {hook}: rank 1: MemoryError: no room for 12 GiB. This handle" in text
