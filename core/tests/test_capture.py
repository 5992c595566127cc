"""`comm.capture()`: every session of every group, left together, whatever one rank does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import capture_ranks
import faulty_plugins
import pytest
import recording_plugins as recording

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks


def install(tmp_path: Path, kind: type[recording.Records] = recording.Records, on: tuple[int, ...] = ()) -> list[Path]:
    """Folders with the backend 'first'."""
    return [faulty_plugins.install_kind(tmp_path / "first", kind, "first", 300, on=on)]


def test_every_session_is_entered_once_and_groups_made_later_are_in_the_next(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(capture_ranks.once_a_session, path=[install(tmp_path)] * 2):
        assert found["first"] == ["first enter", "first leave"]
        assert found["inside"] == ["first enter"] * 2
        assert found["second"] == ["first enter"] * 2 + ["first leave"] * 2
        assert found["world"] == [[[5], [5]], [[7], [7]]]
        assert found["late"] == [[[8], [8]]]


@pytest.mark.parametrize(("at", "expected"), [("entry", [[[6, 5]] * 2]), ("exit", [[[5]] * 2, [[6]] * 2])])
def test_a_thread_that_comes_while_sessions_are_entered_or_left_waits(
    ranks: Ranks, tmp_path: Path, at: str, expected: list[list[list[int]]]
) -> None:
    path = [install(tmp_path, recording.Lingers)] * 2
    for found in ranks.run(capture_ranks.capture_in_two_threads, at, path=path):
        assert found == {"events": ["enter", "leave"] * len(expected), "registered": expected}


def test_a_capture_that_is_left_before_one_inside_it_fails_both_and_no_later_one(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(capture_ranks.leave_before_an_inner_one, path=[install(tmp_path)] * 2):
        assert found["registered"] == [[[7]] * 2]
        for which, words in (("outer", "a nested comm.capture() is open"), ("inner", "ended before this nested one")):
            kind, text = found[which]
            assert kind == "CaptureError"
            assert words in text


def test_ranks_that_capture_nothing_delay_no_other_rank(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(capture_ranks.not_all_capture, world_size=4, path=[install(tmp_path)] * 4)
    for rank, found in enumerate(results):
        captures = [2, 1, 0, 0][rank]
        assert found["elsewhere"] == (["first enter"] * 2 + ["first leave"] * 2) * captures
        assert found["world"] == [[[3]] * 4]
        assert found["pair"] == ([[[4]] * 2] if rank < 2 else []) + [[[2]] * 2]


@pytest.mark.parametrize(("world_size", "tries", "late"), [(2, 1, False), (3, 1, True), (2, 3, True)])
def test_a_rank_that_raises_inside_releases_the_others(
    ranks: Ranks, tmp_path: Path, world_size: int, tries: int, late: bool
) -> None:
    """Also ranks that come after the failure, however often it fails."""
    results = ranks.run(
        capture_ranks.raise_inside,
        1,
        tries,
        late,
        world_size=world_size,
        path=[install(tmp_path)] * world_size,
    )
    for rank, found in enumerate(results):
        assert len(found["outcomes"]) == tries
        for outcome in found["outcomes"]:
            if rank == 1:
                assert outcome == ("ZeroDivisionError", "my own")
                assert found["events"] == ["first enter", "first left by ZeroDivisionError"] * tries
            else:
                assert outcome[0] == "CaptureError"
                assert "rank 1 failed: ZeroDivisionError: my own" in outcome[1]
                assert "backend 'first' of group " in outcome[1]
        assert found["registered"] == [[[9]] * world_size]


@pytest.mark.parametrize(("tries", "late"), [(1, True), (3, False)])
def test_a_rank_that_raises_where_nothing_was_recorded_is_heard_once(
    ranks: Ranks, tmp_path: Path, tries: int, late: bool
) -> None:
    """By captures that record something: the next ones, one for each failure."""
    first, second = ranks.run(capture_ranks.fail_without_calls, 0, tries, late, path=[install(tmp_path)] * 2)
    assert first["outcomes"] == [("ZeroDivisionError", "my own")] * tries
    assert second["outcomes"] == [("ok", "None")] * tries
    assert second["events"] == ["first enter", "first leave"] * tries
    assert len(second["heard"]) == tries
    for kind, text in second["heard"]:
        assert kind == "CaptureError"
        assert "rank 0 failed: ZeroDivisionError: my own" in text
    assert first["registered"] == second["registered"] == [[[9]] * 2]


@pytest.mark.parametrize(("tries", "solo"), [(1, 0), (2, 1)])
def test_captures_of_two_ranks_stay_paired_after_one_captured_alone(
    ranks: Ranks, tmp_path: Path, tries: int, solo: int
) -> None:
    results = ranks.run(capture_ranks.capture_alone_then_fail, 1, solo, tries, path=[install(tmp_path)] * 2)
    assert [kind for kind, _ in results[0]["outcomes"]] == ["CaptureError"] * tries
    assert results[1]["outcomes"] == [("ZeroDivisionError", "my own")] * tries
    for found in results:
        assert found["registered"] == [[[4]] * 2, [[2]] * 2, [[1]] * 2]


def test_a_capture_that_one_rank_left_out_harms_no_later_one(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(capture_ranks.skip_one, 1, path=[install(tmp_path)] * 2)
    assert first[0][0] == "CommTimeoutError"
    assert "rank 1 didn't come in time" in first[0][1]
    assert first[1:] == second == [("ok", "None")] * 2


@pytest.mark.parametrize(
    ("kind", "on"),
    [
        (recording.RaisesBeforeExchange, (0,)),
        (recording.RaisesAfterExchange, (0,)),
        (recording.RaisesBeforeExchange, (0, 1, 2)),
    ],
)
def test_an_exit_that_fails_fails_on_all_ranks(
    ranks: Ranks, tmp_path: Path, kind: type[recording.Records], on: tuple[int, ...]
) -> None:
    results = ranks.run(capture_ranks.fail_then_capture, world_size=3, path=[install(tmp_path, kind, on)] * 3)
    for found in results:
        kind_of_error, text = found["first"]
        assert kind_of_error == "CaptureError"
        assert "failed: OSError: the address can't be exported" in text
        assert "must not be replayed" in text
        # The session that was entered last is left first; once that failed the other is left by exception.
        assert found["events"] == ["first enter", "first enter", "first leave", "first left by CaptureError"]
        assert found["second"] == ("ok", "None")
        pair_registered = [[[5]] * 3] if kind is recording.RaisesAfterExchange else []
        assert found["registered"][0] == [[[6]] * 3]
        assert found["registered"][1][-1] == [[6]] * 3
        assert len(found["registered"][1]) <= 1 + len(pair_registered)


def test_a_session_that_cant_be_entered(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(
        capture_ranks.fail_then_capture, world_size=2, path=[install(tmp_path, recording.EnterRaises, (1,))] * 2
    )
    for rank, found in enumerate(results):
        kind, text = found["first"]
        assert kind == "CaptureError"
        assert "the address can't be exported" in text
        if rank == 1:
            assert "backend 'first' of group " in text
            assert found["events"] == ["first enter"]
        assert found["second"] == ("ok", "None")
        assert found["registered"] == [[[[6]] * 2]] * 2


def test_what_an_exit_by_exception_raises_hides_nothing(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(capture_ranks.raise_inside, 0, path=[install(tmp_path, recording.LeaveByRaises, (0,))] * 2)
    assert results[0]["outcomes"] == [("ZeroDivisionError", "my own")]
    assert [found["registered"] for found in results] == [[[[9]] * 2]] * 2


def test_a_plugin_swallows_no_exception(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(capture_ranks.raise_inside, 0, path=[install(tmp_path, recording.Swallows)] * 2)
    assert results[0]["outcomes"] == [("ZeroDivisionError", "my own")]
    assert results[1]["outcomes"][0][0] == "CaptureError"


def test_groups_that_overlap(ranks: Ranks, tmp_path: Path) -> None:
    groups = [[0, 1], [2, 3], [1, 3], [0, 1, 2, 3]]
    results = ranks.run(capture_ranks.overlap, groups, world_size=4, path=[install(tmp_path)] * 4)
    for rank, found in enumerate(results):
        assert [group for group, _ in found] == [group for group in groups if rank in group]
        for group, registered in found:
            sizes = [4, 5, 6] if group == [0, 1] else [4, 6]
            assert registered == [[[size]] * len(group) for size in sizes]


def test_groups_that_are_gone_and_groups_of_one_pass_through(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(capture_ranks.pass_through, path=[install(tmp_path)] * 2):
        assert [event for event in found["events"] if "close" not in event] == []
        assert found["alone"] == [1.0] * 3


def test_a_group_that_is_destroyed_inside(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(capture_ranks.lose_inside, path=[install(tmp_path)] * 2):
        kind, text = found["first"]
        assert kind == "CaptureError"
        assert "was destroyed" in text
        assert found["second"] == ("ok", "None")


def test_what_isnt_to_be_done_while_a_graph_is_captured(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(capture_ranks.go_wrong, path=[install(tmp_path)] * 2):
        for name, words in {
            "enter": "Enter it first, and torch.cuda.graph within it",
            "get": "Call comm.get_backend(group) before the capture",
            "close": "Call it before the capture, or after",
            "prepare": "Call it before the capture, or after",
            "close inside": "can't be called inside comm.capture()",
            "prepare inside": "can't be called inside comm.capture()",
            "leave": "torch.cuda.graph is the inner block",
        }.items():
            kind, text = found[name]
            assert (name, kind) == (name, "CaptureError")
            assert words in text
        assert "group " in found["get"][1]
        assert found["then"] == ("ok", "None")
        assert found["sum"] == ("ok", "True")


def test_a_rank_that_recorded_nothing_is_named(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(capture_ranks.capture_without_waiting, 1, path=[install(tmp_path)] * 2)
    assert first[0] == "CommTimeoutError"
    assert "rank 1 didn't come in time" in first[1]
    assert second == ("ok", "None")


def test_a_rank_that_comes_after_the_others_deadline_raises_like_them(ranks: Ranks, tmp_path: Path) -> None:
    for (kind, text), then in ranks.run(capture_ranks.leave_late, 1, path=[install(tmp_path)] * 2):
        assert kind == "CommTimeoutError"
        assert "rank 1 didn't come in time" in text
        assert then == ("ok", "None")
