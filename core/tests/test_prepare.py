"""`comm.pre_capture_init`: what needs it is served after it and not before, and all ranks take the same steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import faulty_plugins
import prepare_ranks
import pytest
import recording_plugins as recording
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks

SHAPES = prepare_ranks.SHAPES  # 128 bytes
# Bytes of the messages whose backend `prepare_ranks.prepare` looks up: 8 are served at once, 256 by 'second' too.
LAST = "torch_distributed"
BEFORE = ["first", "second", "second", LAST]


def install(tmp_path: Path, kind: type[recording.Prepares], on: tuple[int, ...] = ()) -> list[Path]:
    """Folders with the backend 'first', which may be faulty, and with 'second', which comes after it."""
    second = faulty_plugins.install_kind(tmp_path / "second", faulty_plugins.Good, "second", 200)
    return [faulty_plugins.install_kind(tmp_path / "first", kind, "first", 300, on=on), second]


def prepare(ranks: Ranks, path: list[Path], *steps: dict[str, Any], world_size: int = 2) -> list[dict[str, Any]]:
    """What each rank found; of decisions, that they are equal."""
    results = ranks.run(prepare_ranks.prepare, steps, world_size=world_size, path=[path] * world_size)
    for found in results:
        assert found["candidates"] == results[0]["candidates"]
        assert found["served"] == results[0]["served"]
    return results


def test_what_is_prepared_is_served_and_grows(ranks: Ranks, tmp_path: Path) -> None:
    steps = [SHAPES, SHAPES, SHAPES | {"max_tokens": 2}, SHAPES | {"max_tokens": 8}, SHAPES | {"hidden_size": 4}]
    for found in prepare(ranks, install(tmp_path, recording.Prepares), *steps, world_size=3):
        assert found["outcomes"] == [("ok", "None")] * 5
        after, grown = ["first", "first", "second", LAST], ["first", "first", "first", LAST]
        assert found["served"] == [BEFORE, after, after, after, grown, ["first", "second", "second", LAST]]
        assert found["events"] == [
            ["first prepare 4x8 torch.float32"],
            [],
            [],
            ["first prepare 8x8 torch.float32"],
            ["first prepare 4x4 torch.float32"],
        ]
        assert "more once comm.pre_capture_init has prepared it" in found["candidates"][0].reason
        assert found["candidates"][1].reason == "available on every rank"
        assert found["closed"] == ["first close orderly=True", "second close orderly=True"]


def test_a_backend_that_serves_nothing_unprepared_is_connected_then(ranks: Ranks, tmp_path: Path) -> None:
    for found in prepare(ranks, install(tmp_path, recording.PreparesFromNothing), SHAPES | {"max_tokens": 8}):
        assert found["served"] == [["second", "second", "second", LAST], ["first", "first", "first", LAST]]
        before, after = found["candidates"]
        assert (before.verdict, before.reason) == ("standby", "serves once comm.pre_capture_init has prepared it")
        assert after.verdict == "serves"
        assert found["events"] == [["first connect", "first prepare 8x8 torch.float32"]]
        # 'second' has nothing left to serve, but peers and graphs may still use its memory until the group is closed.
        assert sorted(found["closed"]) == ["first close orderly=True", "second close orderly=True"]


@pytest.mark.parametrize(
    ("kind", "on", "words"),
    [
        (recording.PrepareRaises, (1,), "MemoryError: no room for the workspace"),
        (recording.PrepareRaises, (0, 1), "MemoryError: no room for the workspace"),
        (recording.PreparesTooMuch, (1,), f"the session takes {1 << 62} bytes; "),
        (recording.PreparesAnEmptyList, (), "pre_capture_init returned no ranges"),
        (recording.PreparesWhatItHasNot, (), "all_reduce_add_rms_norm, which the plugin doesn't implement"),
        (recording.SumsWrongOncePrepared, (1,), "wrong sums"),
    ],
)
def test_a_backend_that_cant_prepare_is_dropped_on_all_ranks(
    ranks: Ranks, tmp_path: Path, kind: type[recording.Prepares], on: tuple[int, ...], words: str
) -> None:
    for found in prepare(ranks, install(tmp_path, kind, on), SHAPES, SHAPES | {"max_tokens": 5}):
        assert found["outcomes"] == [("ok", "None")] * 2
        assert found["served"] == [BEFORE, *[["second", "second", "second", LAST]] * 2]
        dropped = found["candidates"][1]
        assert dropped.verdict == "failed"
        assert words in dropped.reason
        if on == (1,):
            assert dropped.rank == 1
        # In use until then, so it is closed with the group and not before.
        assert not any("close" in event for step in found["events"] for event in step)
        assert sorted(found["closed"]) == ["first close orderly=True", "second close orderly=True"]


def test_a_backend_that_was_never_in_use_gives_back_at_once_what_it_took(ranks: Ranks, tmp_path: Path) -> None:
    for found in prepare(ranks, install(tmp_path, recording.PrepareRaisesFromNothing, (0,)), SHAPES):
        assert found["served"] == [["second", "second", "second", LAST]] * 2
        assert found["events"][0][-1] == "first close orderly=False"
        assert found["closed"] == ["second close orderly=True"]


def test_the_next_candidate_is_prepared_where_one_fails(ranks: Ranks, tmp_path: Path) -> None:
    path = install(tmp_path, recording.PrepareRaisesFromNothing, (0,))
    path.append(faulty_plugins.install_kind(tmp_path / "next", recording.PreparesFromNothing, "next", 250))
    for found in prepare(ranks, path, SHAPES):
        assert found["served"][1] == ["next", "next", "second", LAST]
        assert found["outcomes"] == [("ok", "None")]


def test_a_backend_that_the_caller_named_isnt_dropped_silently(ranks: Ranks, tmp_path: Path) -> None:
    path = [install(tmp_path, recording.PrepareRaises, (1,))] * 2
    for kind, text in ranks.run(prepare_ranks.prepare_a_named_one, path=path):
        assert kind == "BackendUnavailableError"
        assert "rank 1: pre_capture_init: MemoryError: no room for the workspace" in text


def test_ranges_that_differ_are_intersected(ranks: Ranks, tmp_path: Path) -> None:
    step = SHAPES | {"max_tokens": 8}
    for found in prepare(ranks, install(tmp_path, recording.PreparesLess, (1,)), step):
        assert found["served"] == [BEFORE, ["first", "first", "second", LAST]]


def test_nothing_changes_where_a_backend_says_so(ranks: Ranks, tmp_path: Path) -> None:
    for found in prepare(ranks, install(tmp_path, recording.PreparesNothing), SHAPES):
        assert found["served"] == [BEFORE] * 2
        assert found["candidates"][0] == found["candidates"][1]


def test_ranks_with_different_shapes_raise(ranks: Ranks, tmp_path: Path) -> None:
    shapes = [SHAPES, SHAPES, SHAPES | {"dtype": torch.bfloat16}]
    path = [install(tmp_path, recording.Prepares)] * 3
    for first, log, then, served in ranks.run(prepare_ranks.prepare_differently, shapes, world_size=3, path=path):
        assert first[0] == "NegotiationError"
        assert "{2: [4, 8, 'torch.bfloat16'], others: [4, 8, 'torch.float32']}" in first[1]
        assert log == []
        assert then == ("ok", "None")
        assert served == ["first"]


def test_all_groups_are_prepared_and_those_made_later_by_the_next_call(ranks: Ranks, tmp_path: Path) -> None:
    groups = [[0, 1], [2, 3], [1, 3]]
    path = [install(tmp_path, recording.Prepares)] * 4
    for rank, found in enumerate(ranks.run(prepare_ranks.prepare_groups, groups, world_size=4, path=path)):
        *served, (_, world) = found
        assert served == [(group, ["first"]) for group in groups if rank in group]
        assert world == ["second", "first"]


def test_a_rank_that_doesnt_come_is_named(ranks: Ranks, tmp_path: Path) -> None:
    path = [install(tmp_path, recording.Prepares)] * 2
    (first, *after), (_, *too) = ranks.run(prepare_ranks.prepare_late, 1, path=path)
    assert first[0] == "CommTimeoutError"
    assert "rank 1 didn't come in time" in first[1]
    assert after == too == [("ok", "['first', 'second']"), ("ok", "['first', 'first']")]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"max_tokens": 0}, ValueError), ({"hidden_size": 2.0}, ValueError), ({"dtype": torch.complex64}, TypeError)],
)
def test_shapes_that_no_call_could_have(wrong: dict[str, Any], error: type[Exception]) -> None:
    import comm_core as comm

    with pytest.raises(error, match=next(iter(wrong))):
        comm.pre_capture_init(**SHAPES | wrong)
