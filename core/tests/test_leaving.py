"""Ranks never part ways: if one leaves or vanishes in a negotiation, all of them raise, and for the same reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import faulty_plugins as faulty
import leaving_ranks
import pytest
from harness import DEAD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Ranks

LEAVER = 1
# Where a rank vanishes, the others wait for as long, in seconds.
ENV = {"COMM_CORE_CONTROL_TIMEOUT_S": "4", "COMM_CORE_CONNECT_TIMEOUT_S": "4"}
# Where nothing has to time out, in seconds.
LONG = {"COMM_CORE_CONTROL_TIMEOUT_S": "60", "COMM_CORE_CONNECT_TIMEOUT_S": "60"}


@pytest.fixture
def path(tmp_path: Path) -> Callable[[str, str], list[Path]]:
    """Folders with the backend 'first', with which one rank leaves, and with 'second', which is never connected."""

    def make(point: str, way: str) -> list[Path]:
        second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
        return [leaving_ranks.install_leaver(tmp_path, "first", 300, on=LEAVER, point=point, way=way), second]

    return make


def check_alike(results: list[Any], kind: str, text: str) -> None:
    """All ranks have the same error and tried no other backend."""
    for found in results:
        assert found["ending"] == results[0]["ending"]
        assert found["ending"][0] == kind
        assert text in found["ending"][1]
        assert "second" not in found["connected"]
        assert found["groups"] == 0


@pytest.mark.parametrize(("point", "world_size"), [("connect, later", 3), ("admission", 2)])
def test_a_rank_that_is_killed_ends_the_negotiation(ranks: Ranks, path: Any, point: str, world_size: int) -> None:
    folders = [path(point, "killed")] * world_size
    results = ranks.run(leaving_ranks.get, LEAVER, False, world_size=world_size, path=folders, env=ENV, dying=[LEAVER])
    assert results.pop(LEAVER) == DEAD
    check_alike(results, "CommTimeoutError", "rank 1 didn't come in time")
    assert results[0]["ending"][2] == (LEAVER,)


# To the others, a stopped rank looks like one that was killed; and no new process has to start.
@pytest.mark.parametrize(
    ("point", "world_size"),
    [("probe", 2), ("is_available", 3), ("connect", 2), ("vote", 3), ("admission", 2)],
)
def test_a_rank_that_was_stopped_raises_too_once_it_goes_on(
    ranks: Ranks, path: Any, point: str, world_size: int
) -> None:
    folders = [path(point, "stopped")] * world_size
    results = ranks.run(leaving_ranks.get, LEAVER, True, world_size=world_size, path=folders, env=ENV)
    check_alike(results, "CommTimeoutError", "rank 1 didn't come in time")
    assert {found["again"] for found in map(hashable, results)} == {("first", (world_size, world_size))}


def hashable(found: dict[str, Any]) -> dict[str, Any]:
    name, total = found["again"]
    return {"again": (name, tuple(total))}


@pytest.mark.parametrize(
    ("point", "way", "world_size"),
    [
        ("probe", "interrupted", 2),
        ("is_available", "raises KeyboardInterrupt", 3),
        ("connect", "interrupted", 3),
        ("connect, later", "raises KeyboardInterrupt", 2),
        ("memory", "raises KeyboardInterrupt", 2),
        ("vote", "interrupted", 3),
        ("admission", "interrupted", 2),
    ],
)
def test_a_rank_that_leaves_takes_the_others_with_it(
    ranks: Ranks, path: Any, point: str, way: str, world_size: int
) -> None:
    env = [LONG | ({"COMM_CORE_CONNECT_TIMEOUT_S": "4"} if point == "admission" else {})] * world_size
    folders = [path(point, way)] * world_size
    results = ranks.run(leaving_ranks.get, LEAVER, True, world_size=world_size, path=folders, env=env)
    for found in results:
        assert found["again"] == ("first", [world_size, world_size])
    left = results.pop(LEAVER)
    assert left["ending"][0] == "KeyboardInterrupt"
    check_alike(results, "NegotiationError", "rank 1 failed: KeyboardInterrupt")


@pytest.mark.parametrize(
    ("point", "world_size"),
    [("probe", 2), ("is_available", 2), ("connect", 3), ("vote", 2), ("admission", 2)],
)
def test_an_exception_of_the_programs_signal_handler_is_nobody_elses_failure(
    ranks: Ranks, path: Any, point: str, world_size: int
) -> None:
    folders = [path(point, "signals the program")] * world_size
    results = ranks.run(leaving_ranks.get, LEAVER, True, world_size=world_size, path=folders, env=LONG)
    for found in results:
        assert found["again"] == ("first", [world_size, world_size])
    left = results.pop(LEAVER)
    assert left["ending"] == ("AlarmError", "the program's own", ())
    check_alike(results, "NegotiationError", "rank 1 failed: leaving_ranks.AlarmError: the program's own")


@pytest.mark.parametrize("point", ["probe", "is_available", "connect", "memory", "admission"])
def test_a_plugin_that_exits_is_only_dropped(ranks: Ranks, path: Any, point: str) -> None:
    env = LONG | ({"COMM_CORE_CONNECT_TIMEOUT_S": "4"} if point == "admission" else {})
    results = ranks.run(leaving_ranks.get_and_explain, path=[path(point, "exits")] * 2, env=env)
    assert results[0] == results[1]
    candidate, name = results[0]
    assert (candidate.rank, name) == (LEAVER, "second")
    assert "SystemExit: no licence" in candidate.reason


@pytest.mark.parametrize(("way", "world_size"), [("killed", 3), ("stopped", 2), ("interrupted", 2)])
def test_a_rank_that_leaves_a_preparation_ends_all_handles(ranks: Ranks, path: Any, way: str, world_size: int) -> None:
    folders = [path("pre_capture_init", way)] * world_size
    results = ranks.run(
        leaving_ranks.prepare,
        LEAVER,
        world_size=world_size,
        path=folders,
        env=LONG if way == "interrupted" else ENV,
        dying=[LEAVER] if way == "killed" else [],
    )
    if way == "killed":
        results.pop(LEAVER)
    for found in results:
        assert found["call"][0] == "CommError"
        assert "This handle refuses further calls" in found["call"][1]
        assert found["close"][0] == "ok"
    if way == "interrupted":
        assert results.pop(LEAVER)["ending"][0] == "KeyboardInterrupt"
    for found in results:
        assert found["ending"] == results[0]["ending"]
        assert found["ending"][0] == ("NegotiationError" if way == "interrupted" else "CommTimeoutError")
        assert "rank 1" in found["ending"][1]


@pytest.mark.parametrize(
    ("point", "way"),
    [("connect", "typed"), ("connect", "as torch does"), ("admission", "typed"), ("admission", "hangs")],
)
def test_the_cause_is_reported_not_its_consequence(ranks: Ranks, tmp_path: Path, point: str, way: str) -> None:
    folders = [[leaving_ranks.install_blamer(tmp_path, point, way)]] * 3
    env = ENV if way == "hangs" else LONG
    for candidate, name in ranks.run(leaving_ranks.get_and_explain, world_size=3, path=folders, env=env):
        assert (candidate.verdict, candidate.rank, name) == ("failed", LEAVER, "torch_distributed")
        assert "RuntimeError: kernel burst: no such symbol" in candidate.reason
