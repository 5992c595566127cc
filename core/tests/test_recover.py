"""`comm.recover`: the ranks drop what failed, and go on with the same handle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import recover_ranks
import recoverable_plugins as plugins
from comm_core._plan.faults import Fault, failed_backends, read_fault
from comm_core._schema import MalformedError
from faulty_plugins import install_kind
from harness import DEAD

if TYPE_CHECKING:
    from harness import Ranks

# Where nothing has to time out, in seconds.
LONG = {
    "COMM_CORE_CONTROL_TIMEOUT_S": "60",
    "COMM_CORE_CONNECT_TIMEOUT_S": "60",
    "COMM_CORE_WAIT_TIMEOUT_S": "60",
}
# Where a rank is missing, the others wait for as long, in seconds.
SHORT = {"COMM_CORE_CONTROL_TIMEOUT_S": "4", "COMM_CORE_CONNECT_TIMEOUT_S": "4", "COMM_CORE_WAIT_TIMEOUT_S": "3"}
GOOD = ("ok", "", ())
#: As many as `recover_ranks.sums` returns.
RIGHT = [True] * 18


@pytest.fixture
def path(tmp_path: Path) -> list[Path]:
    """Two backends, of which the second serves larger messages."""
    return [
        install_kind(tmp_path / "first", plugins.Bounded, "first", 300),
        install_kind(tmp_path / "second", plugins.BoundedMore, "second", 200),
    ]


def check_plan(plan: dict[str, Any], reason: str, rank: int, name: str = "first") -> None:
    """The plan has the failed backend's reason and rank, and another backend serves."""
    verdict, text, failing = plan["candidates"][name]
    assert (verdict, failing) == ("failed", rank)
    assert reason in text
    assert f"rank {rank}: {text}" in plan["text"]
    assert plan["name"] == ("second" if name == "first" else "first")


@pytest.mark.parametrize(
    ("world_size", "rank", "point", "way", "words"),
    [
        (2, 0, "before", "raises", "all_reduce: ValueError: no such symbol"),
        (3, 0, "after", "raises", "all_reduce: ValueError: no such symbol"),
        (3, 1, "before", "runs out of memory", "all_reduce: torch.OutOfMemoryError: no room for 12 GiB"),
        (3, 1, "before", "raises KeyboardInterrupt", "all_reduce: KeyboardInterrupt"),
        (3, 2, "before", "exits", "all_reduce: SystemExit: no licence"),
        (2, 1, "check", "raises", "check: ValueError: no such symbol"),
    ],
)
def test_a_failed_backend_is_dropped_on_all_ranks_and_the_same_handle_goes_on(
    ranks: Ranks, path: list[Path], world_size: int, rank: int, point: str, way: str, words: str
) -> None:
    results = ranks.run(
        recover_ranks.fail_and_recover, point, way, rank, world_size=world_size, path=[path] * world_size, env=LONG
    )
    assert results[rank]["raised"] != ""
    for found in results:
        assert found["recover"] == GOOD
        check_plan(found["plan"], words, rank)
        assert found["plan"]["candidates"] == results[0]["plan"]["candidates"]
        assert (found["failure"], found["same"], found["check"], found["counted"]) == (None, True, "ok", True)
        assert found["sums"] == RIGHT * 3
        # Both old sessions are closed, and only the second backend is connected again.
        changes = [event for event in found["events"] if event not in ("abort", "enter", "leave")]
        assert changes == ["close orderly=False", "close orderly=False", "connect"]
        assert found["again"] == []
        assert found["closed"] == ["close orderly=True"]
        assert found["keys"] == 0
        assert found["held"] == {}


def test_nothing_changes_if_nothing_failed(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.nothing_failed, world_size=3, path=[path] * 3, env=LONG):
        assert (found["ending"], found["group"], found["closed"]) == (GOOD, GOOD, GOOD)
        assert (found["events"], found["same"], found["sums"]) == ([], True, RIGHT)


def test_failures_one_after_another_end_at_torch_distributed(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.fail_one_after_another, path=[path] * 2, env=LONG):
        assert found["names"] == ["first", "second", "torch_distributed"]
        for rank, name in enumerate(("first", "second")):
            assert found["plan"]["candidates"][name] == ("failed", "all_reduce: ValueError: no such symbol", rank)


def test_backends_that_fail_at_once_are_all_dropped(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.fail_in_two_backends, path=[path] * 2, env=LONG):
        assert found["error"] == "CommError"
        assert found["plan"]["name"] == "torch_distributed"
        assert found["sums"] == RIGHT


def test_a_backend_that_only_waited_for_a_stopped_rank_stays(ranks: Ranks, path: list[Path]) -> None:
    first, second = ranks.run(recover_ranks.a_bystander, path=[path] * 2, env=LONG)
    assert (first["first"], second["second"]) == ("CommError", "CommError")
    for found in (first, second):
        check_plan(found["plan"], "all_reduce: the link is down", 0)
        assert found["sums"] == RIGHT


@pytest.mark.parametrize(("world_size", "absent"), [(2, 1), (3, 0)])
def test_a_rank_that_made_no_call_recovers_with_the_others(
    ranks: Ranks, path: list[Path], world_size: int, absent: int
) -> None:
    env = LONG | {"COMM_CORE_WAIT_TIMEOUT_S": "3"}
    results = ranks.run(recover_ranks.make_no_call, absent, world_size=world_size, path=[path] * world_size, env=env)
    for rank, found in enumerate(results):
        assert found["call"][0] in (["ok"] if rank == absent else ["CommTimeoutError", "CommError"])
        assert found["recover"] == GOOD
        verdict, reason, failing = found["plan"]["candidates"]["first"]
        assert verdict == "failed"
        assert failing != absent
        assert f"rank {absent} didn't come" in reason
        assert found["plan"]["candidates"] == results[0]["plan"]["candidates"]
        assert found["sums"] == RIGHT


@pytest.mark.parametrize(("world_size", "late"), [(2, 1), (3, 0)])
def test_a_rank_that_comes_too_late_recovers_with_the_next_call(
    ranks: Ranks, path: list[Path], world_size: int, late: int
) -> None:
    results = ranks.run(recover_ranks.come_late, late, world_size=world_size, path=[path] * world_size, env=LONG)
    for rank, found in enumerate(results):
        if rank != late:
            kind, text, absent = found["first"]
            assert (kind, absent) == ("CommTimeoutError", (late,))
            assert f"can't recover: rank {late} didn't come in time. Nothing has changed. If a rank is gone" in text
            assert found["between"][0] == "CommError"
        assert (found["second"], found["sums"]) == (GOOD, RIGHT)


@pytest.mark.parametrize(("killed", "where"), [(0, "a call"), (2, "connect")])
def test_the_survivors_of_a_lost_rank_make_a_new_group(ranks: Ranks, path: list[Path], killed: int, where: str) -> None:
    results = ranks.run(
        recover_ranks.lose_a_rank, killed, where, world_size=3, path=[path] * 3, env=SHORT, dying=[killed]
    )
    assert results.pop(killed) == DEAD
    for found in results:
        kind, text, absent = found["recover"]
        assert (kind, absent) == ("CommTimeoutError", (killed,))
        assert f"rank {killed} didn't come in time" in text
        assert "new_group" in text
        assert found["later"][0] in ("CommError", "CommTimeoutError")
        assert found["close"] == GOOD
        assert (found["sums"], found["name"]) == (RIGHT, "first")
        if where == "connect":
            assert found["again"][0] == "CommError"


@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (3, 2)])
def test_a_rank_that_leaves_ends_the_handle_on_all(ranks: Ranks, path: list[Path], world_size: int, rank: int) -> None:
    results = ranks.run(recover_ranks.leave, rank, world_size=world_size, path=[path] * world_size, env=LONG)
    for number, found in enumerate(results):
        kind, text, _ = found["recover"]
        if number == rank:
            assert kind == "KeyboardInterrupt"
        else:
            assert kind == "NegotiationError"
            assert f"rank {rank} failed: KeyboardInterrupt" in text
        for later in (found["later"], found["again"]):
            assert later[0] == "CommError"
            assert "Close it on all ranks and get a new handle" in later[1]
        assert (found["close"], found["sums"]) == (GOOD, RIGHT)


@pytest.mark.parametrize(("rank", "backends"), [(2, None), (0, ("first", "second"))])
def test_a_backend_that_fails_to_connect_again_is_dropped_too(
    ranks: Ranks, path: list[Path], rank: int, backends: tuple[str, ...] | None
) -> None:
    job: dict[str, Any] = {"world_size": 3, "path": [path] * 3, "env": LONG}
    for found in ranks.run(recover_ranks.fail_again_in_connect, rank, backends, **job):
        assert found["recover"][0] == ("BackendUnavailableError" if backends else "ok")
        assert found["plan"]["name"] == ("first" if backends else "torch_distributed")
        assert found["plan"]["candidates"]["second"][1:] == ("ValueError: no such symbol", rank)
        assert found["sums"] == RIGHT


@pytest.mark.parametrize("backends", [("first",), ("first", "second")])
def test_a_backend_that_the_caller_named_isnt_replaced(
    ranks: Ranks, path: list[Path], backends: tuple[str, ...]
) -> None:
    for found in ranks.run(recover_ranks.a_named_backend_fails, backends, path=[path] * 2, env=LONG):
        kind, text, _ = found["recover"]
        assert kind == "BackendUnavailableError"
        assert "backend 'first' failed on rank 1 in all_reduce: ValueError: no such symbol" in text
        assert found["later"][0] == "CommError"
        assert found["sums"] == RIGHT


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("suspended", "CommError", "is suspended. Call comm.resume(group) on all its ranks first. Nothing has changed"),
        ("torch.distributed", "CommError", "torch.distributed, the fallback, failed on rank 1 in all_reduce: Runtime"),
        ("for good", "CommError", "rank 1: its memory is gone"),
        ("a thread", "CommError", "rank 1: a thread is still in a call of the handle"),
        ("a capture", "CaptureError", "comm.recover can't be called inside comm.capture()"),
        ("a stream", "CaptureError", "comm.recover can't wait for other ranks"),
    ],
)
def test_a_group_that_cant_recover_says_so_on_all_ranks(
    ranks: Ranks, path: list[Path], what: str, kind: str, words: str
) -> None:
    for found in ranks.run(recover_ranks.refuse, what, path=[path] * 2, env=LONG):
        assert found["recover"][0] == kind
        assert words in found["recover"][1]
        assert found.get("sums", RIGHT) == RIGHT


def test_a_misuse_costs_no_backend(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.differ_in_debug_mode, path=[path] * 2, env=LONG | {"COMM_CORE_DEBUG": "1"}):
        assert (found["call"], found["recover"]) == ("CommError", GOOD)
        assert {verdict for verdict, _, _ in found["plan"]["candidates"].values()} == {"serves"}
        assert found["sums"] == RIGHT


def test_backends_are_prepared_and_captured_again(ranks: Ranks, tmp_path: Path) -> None:
    path = [
        install_kind(tmp_path / "first", plugins.Prepares, "first", 300),
        install_kind(tmp_path / "second", plugins.BoundedMore, "second", 200),
    ]
    for found in ranks.run(recover_ranks.capture_before_and_after, 1, path=[path] * 2, env=LONG):
        assert found["served"] == ["first", "torch_distributed", "first"]
        assert found["registered"] == [[[2], [2]]]
        assert found["sums"] == RIGHT


def test_one_of_two_groups_recovers(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.recover_two_groups, path=[path] * 2, env=LONG):
        assert (found["sound"], found["other"]) == ("first", "second")
        assert found["sums"] == RIGHT * 2


@pytest.mark.parametrize("kind", ["a group of one", "no process group"])
def test_a_rank_alone_recovers(ranks: Ranks, kind: str) -> None:
    (found,) = ranks.run(recover_ranks.recover_alone, kind, world_size=1)
    assert (found["stopped"], found["sum"]) == ("CommError", [1.0, 1.0])
    assert found["suspended"][0] == "CommError"


def test_a_program_for_torch_distributed_goes_on(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.recover_by_torch, backend="comm", path=[path] * 2, env=LONG):
        assert found["raised"] == ["CommError", "CommError"]
        assert (found["sums"], found["name"]) == ([True, True], "second")
        assert found["served"] == ["first", "second"]


def test_replays_of_earlier_graphs_are_reported(ranks: Ranks, path: list[Path]) -> None:
    for found in ranks.run(recover_ranks.keep_sessions, path=[path] * 2, env=LONG):
        assert not any("close" in event for event in found["events"])
        assert (found["check"], found["sums"]) == (GOOD, RIGHT)
        kind, text, _ = found["replayed"]
        assert kind == "CommError"
        assert "backend 'first' of group" in text
        assert "Graphs that were captured before comm.recover must not be replayed: capture them again" in text
        assert found["after"] == ["ok", *RIGHT]
        assert found["closed"] == ["close orderly=True"] * 3


OWN = Fault("first", "all_reduce: KeyError", "own")
WAITED = Fault("second", "all_reduce: rank 0 didn't come", "late")
HEARD = Fault("second", "all_reduce: rank 0 stopped", "reported")


@pytest.mark.parametrize(
    ("faults", "failed"),
    [
        ([None, None], {}),
        ([Fault("", "two threads"), None], {}),
        ([None, OWN], {"first": 1}),
        ([WAITED, HEARD, OWN], {"first": 2}),
        ([OWN, Fault("third", "check: OSError", "own"), OWN], {"first": 0, "third": 1}),
        ([WAITED, Fault("first", "all_reduce: the link is down", "reported", first=True)], {"first": 1}),
        ([Fault("", "another rank stopped"), WAITED, HEARD], {"second": 2}),
        ([WAITED, Fault("third", "all_reduce: rank 0 didn't come", "late")], {"second": 0}),
    ],
)
def test_the_cause_is_dropped_not_its_consequence(faults: list[Fault | None], failed: dict[str, int]) -> None:
    assert {name: rank for name, (_, rank) in failed_backends(faults).items()} == failed
    assert [fault and read_fault(fault.to_json(), "report") for fault in faults] == faults


@pytest.mark.parametrize("value", [[], ["first", "why", 3, False], ["first", 1, 0, False], ["first", "why", 0, 0], "x"])
def test_a_report_that_cant_be_read_is_refused(value: Any) -> None:
    with pytest.raises(MalformedError, match="report"):
        read_fault(value, "report")
