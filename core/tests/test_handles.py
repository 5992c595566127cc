"""What callers do with handles, rightly and wrongly: names, environments, late ranks, `close`, groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import faulty_plugins as faulty
import handle_ranks
import pytest
from harness import DEAD

if TYPE_CHECKING:
    from harness import Ranks


@pytest.fixture
def sound(tmp_path: Path) -> list[Path]:
    """Folders with the backend 'second', and with 'first', which comes before it."""
    second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
    return [faulty.install_kind(tmp_path / "first", faulty.Good, "first", 300), second]


@pytest.fixture
def faulted(tmp_path: Path, sound: list[Path]) -> list[Path]:
    """As `sound`, but the first one's `connect` raises on rank 1."""
    return [faulty.install_kind(tmp_path / "faulted", faulty.ConnectRaisesBetween, "first", 300, on=[1]), sound[1]]


def test_a_named_backend_serves_and_no_other_is_tried(ranks: Ranks, sound: list[Path]) -> None:
    for named, tried, any_, right in ranks.run(handle_ranks.get_named_then_any, ("second",), path=[sound] * 2):
        assert named == ("ok", "second")
        assert tried == ["second"]
        assert any_ == ("ok", "first")
        assert right


@pytest.mark.parametrize(
    ("name", "blocked", "reason", "world_size"),
    [
        ("first", {}, "rank 1: ConnectionError: no route to the peer", 3),
        ("lacking", {}, "rank 1: not installed here, but installed on other ranks", 3),
        ("nobodys", {}, "not installed on any rank", 2),
        ("second", {"COMM_CORE_DISABLE": "second"}, "COMM_CORE_DISABLE names it", 2),
        ("second", {"COMM_CORE_PLUGINS": "first"}, "COMM_CORE_PLUGINS doesn't name it", 2),
    ],
)
def test_a_named_backend_that_cant_serve(
    ranks: Ranks, tmp_path: Path, faulted: list[Path], name: str, blocked: dict[str, str], reason: str, world_size: int
) -> None:
    lacking = faulty.install_kind(tmp_path / "lacking", faulty.Good, "lacking", 100)
    path = [faulted if rank == 1 else [*faulted, lacking] for rank in range(world_size)]
    found = ranks.run(handle_ranks.get_named_then_any, (name,), world_size=world_size, path=path, env=blocked)
    for named, _, any_, right in found:
        assert named == found[0][0]
        kind, text = named
        assert kind == "BackendUnavailableError"
        assert f"backend '{name}' was named" in text
        assert reason in text
        # The group isn't the worse for it.
        assert any_ == ("ok", "torch_distributed" if blocked else "second")
        assert right


def test_backends_in_the_environment_warn_once_and_fall_back(ranks: Ranks, faulted: list[Path]) -> None:
    env = {"COMM_CORE_BACKENDS": "first"}
    found = ranks.run(handle_ranks.get_twice_and_listen, env=env, path=[faulted] * 2)
    (warning,), no_warnings = (texts for texts, _, _ in found)
    assert no_warnings == []
    for part in ("COMM_CORE_BACKENDS names 'first'", "rank 1: ConnectionError: no route to the peer", "Falling back"):
        assert part in warning
    for _, decision, right in found:
        assert {rule["backend"] for route in decision["routes"] for rule in route["rules"]} == {"torch_distributed"}
        assert right


def test_a_disabled_name_that_is_not_installed_is_reported_once(ranks: Ranks, sound: list[Path]) -> None:
    env = {"COMM_CORE_DISABLE": "secnod"}
    found = ranks.run(handle_ranks.get_twice_and_listen, env=env, path=[sound] * 2)
    assert [texts for texts, _, _ in found] == [["COMM_CORE_DISABLE names 'secnod', which isn't installed here"], []]
    assert all(right for _, _, right in found)


def test_an_unnamed_backend_that_fails_is_reported_once(ranks: Ranks, faulted: list[Path]) -> None:
    (warning,), no_warnings = (
        texts for texts, _, _ in ranks.run(handle_ranks.get_twice_and_listen, path=[faulted] * 2)
    )
    assert no_warnings == []
    for part in ("backend 'first' failed for ", "rank 1: ConnectionError: no route to the peer", "Falling back"):
        assert part in warning


def test_backends_in_the_environment_serve(ranks: Ranks, sound: list[Path]) -> None:
    env = {"COMM_CORE_BACKENDS": "second"}
    for named, tried, any_, right in ranks.run(handle_ranks.get_named_then_any, ("second",), env=env, path=[sound] * 2):
        assert (named, tried, any_, right) == (("ok", "second"), ["second"], ("ok", "second"), True)


def test_the_fallback_cant_be_disabled(ranks: Ranks, faulted: list[Path]) -> None:
    plain, disabled = (
        ranks.run(handle_ranks.get_twice_and_listen, env=env, path=[faulted] * 2)
        for env in ({}, {"COMM_CORE_DISABLE": "torch_distributed"})
    )
    assert plain == disabled


@pytest.mark.parametrize(
    ("variable", "value", "world_size"),
    [
        ("BACKENDS", "second", 2),
        ("DISABLE", "second", 3),
        ("PLUGINS", "second", 2),
        ("CONTROL_TIMEOUT_S", "77", 3),
        ("CONNECT_TIMEOUT_S", "77", 2),
        ("WAIT_TIMEOUT_S", "77", 2),
        ("MEMORY_BUDGET_NBYTES", "77", 2),
        ("CONTROL_TIMEOUT_S", "soon", 2),
        ("MEMORY_BUDGET_NBYTES", "1 GiB", 3),
    ],
)
def test_environments_that_differ(ranks: Ranks, sound: list[Path], variable: str, value: str, world_size: int) -> None:
    env: list[dict[str, str]] = [{} for _ in range(world_size)]
    env[1] = {f"COMM_CORE_{variable}": value}
    found = ranks.run(
        handle_ranks.get_then_clear_the_environment, world_size=world_size, env=env, path=[sound] * world_size
    )
    for first, then in found:
        assert first == found[0][0]
        assert first[0] == "NegotiationError"
        assert f"COMM_CORE_{variable}" in first[1]
        assert ("rank 1: " if value in ("soon", "1 GiB") else "{1: ") in first[1]
        assert value in first[1]
        assert then == ("ok", "first")


@pytest.mark.parametrize("names", [[("first",), ("second",)], [None, ("second",)], [("first", "second"), ("second",)]])
def test_arguments_that_differ(ranks: Ranks, sound: list[Path], names: Any) -> None:
    found = ranks.run(handle_ranks.get_differently_then_alike, names, path=[sound] * 2)
    for first, then in found:
        assert first == found[0][0]
        assert first[0] == "NegotiationError"
        assert "get_backend(backends=...) differs between the ranks" in first[1]
        assert "{1: " in first[1]
        assert then == ("ok", "first")


def test_wrong_arguments_raise_at_once_and_alone(ranks: Ranks, sound: list[Path]) -> None:
    found, _ = ranks.run(handle_ranks.get_wrongly, path=[sound] * 2)
    kinds = {name: kind for name, (kind, _) in found.items()}
    assert kinds == dict.fromkeys(kinds, "ValueError") | {"no group": "TypeError"}
    assert len(kinds) == 7
    assert "has a handle with backends=None, timeout_s=60" in found["other timeout"][1]


@pytest.mark.parametrize(("world_size", "late"), [(2, 0), (3, 2)])
def test_a_rank_that_comes_after_the_deadline(ranks: Ranks, sound: list[Path], world_size: int, late: int) -> None:
    found = ranks.run(handle_ranks.get_late, late, world_size=world_size, path=[sound] * world_size)
    for first, absent, then in found:
        assert first == found[0][0]
        assert f"rank {late} didn't come in time" in first[1]
        assert absent == (late,)
        assert then == ("ok", "first")


@pytest.mark.parametrize(("world_size", "late"), [(3, 1)])
def test_ranks_that_try_again_find_each_other(ranks: Ranks, sound: list[Path], world_size: int, late: int) -> None:
    found = ranks.run(handle_ranks.get_until_all_are_there, late, world_size=world_size, path=[sound] * world_size)
    assert found == [True] * world_size


def test_close(ranks: Ranks, sound: list[Path]) -> None:
    for found in ranks.run(handle_ranks.close_twice, path=[sound] * 2):
        assert found["events"] == ["connect", "close orderly=True"]
        assert len(found["calls"]) == 5
        for kind, text in found["calls"].values():
            assert kind == "CommError"
            assert "its handle was closed" in text
        assert found["fresh"]


def test_a_handle_that_a_thread_gets_while_another_closes_is_found_and_closed_later(
    ranks: Ranks, sound: list[Path]
) -> None:
    for found in ranks.run(handle_ranks.get_while_another_thread_closes, path=[sound] * 2):
        assert found == {
            "new": True,
            "kept": True,
            "sum": True,
            "closed": "CommError",
            "events": ["connect", "close orderly=True"] * 2,
        }


def test_close_without_a_group_closes_all(ranks: Ranks, sound: list[Path]) -> None:
    for found in ranks.run(handle_ranks.close_all_groups, path=[sound] * 2):
        assert [kind for kind, _ in found] == ["CommError"] * 3


@pytest.mark.parametrize("closes", [True, False])
def test_a_group_that_was_destroyed_first(ranks: Ranks, sound: list[Path], closes: bool) -> None:
    for found in ranks.run(handle_ranks.destroy_before_close, closes, path=[sound] * 2):
        assert found["get"][0] == "ValueError"
        assert "destroyed" in found["get"][1]
        (warning,) = found["warnings"]
        assert "was destroyed before comm.close(group)" in warning
        assert found["events"] == ["connect", "close orderly=False", "connect"]
        assert found["call"][0] == "CommError"
        assert found["another"]


@pytest.mark.parametrize(("world_size", "killed"), [(3, 0)])
def test_a_peer_that_is_killed_before_close(ranks: Ranks, sound: list[Path], world_size: int, killed: int) -> None:
    found = ranks.run(
        handle_ranks.close_without, killed, world_size=world_size, path=[sound] * world_size, dying=[killed]
    )
    assert found.pop(killed) == DEAD
    for survivor in found:
        (warning,) = survivor["warnings"]
        assert "is closed without waiting for all its ranks" in warning
        assert f"rank {killed} didn't come in time" in warning
        assert survivor["events"] == ["close orderly=False"]
        assert survivor["call"][0] == "CommError"


def test_groups_that_overlap(ranks: Ranks, sound: list[Path]) -> None:
    groups = [[0, 1, 2], [1, 3], [2, 3], [0, 1, 2, 3], [3, 1]]
    found = ranks.run(handle_ranks.overlap, groups, world_size=4, path=[sound] * 4)
    for number, group in enumerate(groups):
        decisions = [found[rank][number][0] for rank in group]
        assert decisions == [decisions[0]] * len(group)
        for rank in range(4):
            if rank in group:
                assert found[rank][number][1] is True
            else:
                kind, text = found[rank][number]
                assert kind == "ValueError"
                assert f"rank {rank} isn't in this group" in text


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("no process group", 1), ("no process group", 2), ("a world of one", 1), ("a group of one", 2)],
)
def test_a_group_of_one(ranks: Ranks, sound: list[Path], kind: str, world_size: int) -> None:
    expected = {
        "copied": True,
        "in place": True,
        "normed": True,
        "total": True,
        "name": "torch_distributed",
        "refused": "TypeError",
        "same": True,
        "closed": "CommError",
        "again": ("ok", "torch_distributed"),
    }
    assert (
        ranks.run(handle_ranks.alone, kind, world_size=world_size, path=[sound] * world_size) == [expected] * world_size
    )


def test_a_process_alone_has_its_handle_again_after_the_world(ranks: Ranks) -> None:
    expected = {"same": True, "sums": [1.0, 2.0, 1.0]}
    assert ranks.run(handle_ranks.alone_before_and_after_the_world) == [expected] * 2
