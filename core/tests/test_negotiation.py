"""Whatever one rank's plugin does, all ranks hold the same decision, and the next candidate serves."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import faulty_plugins as faulty
import pytest
import topology_plugins
import torch
import torch.distributed as dist
from comm_core._control.store import store_of
from harness import install

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from harness import Ranks

# For a backend's `connect` and its admission, in seconds: far more than a sound backend takes on a busy machine.
CONNECT_TIMEOUT_S = 100
# The same where a backend hangs, which takes as long.
SHORT_TIMEOUT_S = 6
BUDGET_NBYTES = 1000
ENV = {
    "COMM_CORE_CONTROL_TIMEOUT_S": "50",
    "COMM_CORE_MEMORY_BUDGET_NBYTES": str(BUDGET_NBYTES),
}
# The group's ranks in the job; the faulty one is always the second.
GROUPS = [(0, 1), (0, 1, 2), (1, 2)]


@dataclasses.dataclass
class Life:
    """What one rank saw of a group, from its first `get_backend` to its second `close`."""

    decisions: list[Any]
    explained: str
    sums: list[bool]
    log: list[tuple[str, str, str]]
    threads: list[str]
    keys: int


def live(members: tuple[int, ...]) -> Life | None:
    """Get, use and close the backend of a group twice; runs in every rank of the job."""
    faulty.LOG.clear()
    faulty.RELEASE.clear()
    group = dist.group.WORLD if len(members) == dist.get_world_size() else dist.new_group(list(members))
    if not isinstance(group, dist.ProcessGroup):
        return None
    keys = count_keys(group)
    decisions, sums = [], []
    for _ in range(2):
        backend = comm.get_backend(group)
        decisions.append(backend.decision.to_json())
        explained = backend.explain()
        sums.append(sums_right(backend, group))
        faulty.RELEASE.set()
        threads = threads_left()
        comm.close(group)
    return Life(decisions, explained, sums, list(faulty.LOG), threads, count_keys(group) - keys)


def sums_right(backend: comm.Backend, group: dist.ProcessGroup) -> bool:
    """Whether small and large messages, in place and not, have the sum of 1, 2, ... ranks."""
    size = dist.get_world_size(group)
    right = []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for numel in (1, 24, 3000):
            tensor = torch.full((numel,), dist.get_rank(group) + 1, dtype=dtype)
            total = torch.full_like(tensor, size * (size + 1) // 2)
            right += [torch.equal(backend.all_reduce(tensor), total), backend.all_reduce(tensor, out=tensor) is tensor]
            right.append(torch.equal(tensor, total))
    return all(right)


def count_keys(group: dist.ProcessGroup) -> int:
    """Keys in the job's store once every rank of the group is here."""
    dist.barrier(group)
    count: int = store_of(group).num_keys()
    dist.barrier(group)
    return count


def threads_left() -> list[str]:
    """Threads of comm_core that don't end although nothing holds them up any more."""
    # Not the benchmark's, which earlier tests in this process may have left.
    ours = [thread for thread in threading.enumerate() if re.match("comm-core (?!bench)", thread.name)]
    for thread in ours:
        thread.join(20)
    return [thread.name for thread in ours if thread.is_alive()]


def run_lives(
    ranks: Ranks, members: tuple[int, ...], path: list[list[Path]], connect_timeout_s: int = CONNECT_TIMEOUT_S
) -> list[Life]:
    """The lives of a group's members, checked for what holds whatever happens."""
    env = ENV | {"COMM_CORE_CONNECT_TIMEOUT_S": str(connect_timeout_s)}
    lives = [life for life in ranks.run(live, members, world_size=len(path), env=env, path=path) if life is not None]
    assert len(lives) == len(members)
    for life in lives:
        assert life.decisions == lives[0].decisions
        assert life.explained == lives[0].explained
        assert life.sums == [True, True]
        assert life.threads == []
        # The incarnation's number stays: a rank that comes late looks there.
        assert life.keys == 1
        events = Counter((name, session, event.split()[0]) for name, session, event in life.log)
        opened = {key[:2] for key in events if key[2] == "connect"}
        assert {key[:2]: count for key, count in events.items() if key[2] == "close"} == dict.fromkeys(opened, 1)
    return lives


def candidate(life: Life, name: str, turn: int = 0) -> dict[str, Any]:
    return next(item for item in life.decisions[turn]["candidates"] if item["name"] == name)


def served_by(life: Life, dtype: str = "float32", turn: int = 0) -> list[str]:
    routes = life.decisions[turn]["routes"]
    (rules,) = (r["rules"] for r in routes if (r["op"], r["mode"], r["dtype"]) == ("all_reduce", "eager", dtype))
    return [rule["backend"] for rule in rules]


def world_of(members: Collection[int]) -> int:
    return max(members) + 1


def name_group(members: Collection[int]) -> str:
    return f"{'-'.join(map(str, members))}of{world_of(members)}"


def spread(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Give each case one kind of group, in turn: neighbouring cases fail in the same stage, so each stage meets all."""
    return [
        pytest.param(members, *case, id=f"{getattr(case[0], '__name__', case[1])}-{name_group(members)}")
        for members, case in zip(itertools.cycle(GROUPS), cases, strict=False)
    ]


@pytest.fixture(params=GROUPS, ids=name_group)
def members(request: pytest.FixtureRequest) -> tuple[int, ...]:
    group: tuple[int, ...] = request.param
    return group


@pytest.fixture
def path(tmp_path: Path, members: tuple[int, ...]) -> Callable[[type[faulty.Good]], list[list[Path]]]:
    """Folders, a list a rank, with the backend 'second' and, before it, 'first' of a kind with the fault."""

    def make(kind: type[faulty.Good]) -> list[list[Path]]:
        second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
        first = faulty.install_kind(tmp_path / "first", kind, "first", 300, on=[members[1]])
        return [[first, second]] * world_of(members)

    return make


def test_a_sound_backend_serves_what_it_offers(ranks: Ranks, members: tuple[int, ...], path: Any) -> None:
    for life in run_lives(ranks, members, path(faulty.Good)):
        assert served_by(life) == ["first", "torch_distributed"]
        assert candidate(life, "second")["verdict"] == "standby"
        assert {event for name, _, event in life.log if name == "first"} == {
            "connect",
            "all_reduce",
            "close orderly=True",
        }
        assert "second" not in {name for name, _, _ in life.log}


FAULTS = [
    (faulty.ProbeRaises, "unavailable", "probe() failed: OSError: no compiler"),
    (faulty.ProbeIsLong, "unavailable", "at most 512 bytes"),
    (faulty.SaysNo, "unavailable", "its card is unplugged"),
    (faulty.AskRaises, "unavailable", "OSError: the driver went away"),
    (faulty.AskExits, "unavailable", "SystemExit: no licence"),
    (faulty.AskRaisesNoteless, "unavailable", "is_available raised Noteless"),
    (faulty.AskRaisesALongText, "unavailable", "RuntimeError: the build failed: undefined symbol"),
    (faulty.AskReturnsNone, "unavailable", "neither Available nor Unavailable"),
    (faulty.ConnectRaisesBefore, "failed", "ConnectionError: no route to the peer"),
    (faulty.ConnectRaisesBetween, "failed", "ConnectionError: no route to the peer"),
    (faulty.ConnectRaisesAfter, "failed", "ConnectionError: no route to the peer"),
    (faulty.ConnectIgnoresErrors, "failed", "ConnectionError: no route to the peer"),
    (faulty.ConnectRaisesTextless, "failed", "Textless: <exception str() failed>"),
    (faulty.ConnectTimesOutAlone, "failed", "no answer from the licence server"),
    (faulty.ConnectExits, "failed", "SystemExit: no licence"),
    (faulty.ConnectReturnsNone, "failed", "returned None"),
    (
        faulty.ConnectTakesTooMuch,
        "failed",
        f"{BUDGET_NBYTES + 1} bytes; {BUDGET_NBYTES} of COMM_CORE_MEMORY_BUDGET_NBYTES are left",
    ),
    (faulty.ConnectCountsBadly, "failed", "plenty"),
    (faulty.SumsWrong, "failed", "wrong sums"),
    (faulty.SumRaises, "failed", "ArithmeticError: an illegal access"),
    (faulty.SumRaisesItsOwnCause, "failed", "RuntimeError: no symbol"),
    (faulty.SumExits, "failed", "SystemExit: out of licences"),
]


@pytest.mark.parametrize(("members", "kind", "verdict", "reason"), spread(FAULTS), indirect=["members"])
def test_a_fault_on_one_rank_drops_the_backend_on_all(
    ranks: Ranks, members: tuple[int, ...], path: Any, kind: type[faulty.Good], verdict: str, reason: str
) -> None:
    for life in run_lives(ranks, members, path(kind)):
        for turn in (0, 1):
            first = candidate(life, "first", turn)
            assert (first["verdict"], first["rank"]) == (verdict, 1), first
            assert reason in first["reason"]
            assert len(first["reason"]) < 5000
            assert served_by(life, turn=turn) == ["second", "torch_distributed"]
        label = "rank 1" if members[1] == 1 else f"rank 1 ({members[1]} in the job)"
        assert f"{label}: " in life.explained
        assert {event for name, _, event in life.log if name == "first"} <= {
            "connect",
            "all_reduce",
            "close orderly=False",
        }


@pytest.mark.parametrize(
    ("members", "kind"),
    [((0, 1, 2), faulty.ConnectExchangesLess), ((1, 2), faulty.ConnectBarsInsteadOfGathering)],
    indirect=["members"],
)
def test_ranks_that_exchange_differently_in_connect(
    ranks: Ranks, members: tuple[int, ...], path: Any, kind: type[faulty.Good]
) -> None:
    for life in run_lives(ranks, members, path(kind)):
        assert candidate(life, "first")["verdict"] == "failed"
        assert "exchange" in candidate(life, "first")["reason"]
        assert served_by(life) == ["second", "torch_distributed"]


# Each takes its deadline: not every kind of group for every kind of fault.
@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ((0, 1, 2), faulty.ConnectHangs),
        ((1, 2), faulty.ConnectHangsInExchange),
        ((0, 1, 2), faulty.ConnectRaisesAndPeersHang),
    ],
    indirect=["members"],
)
def test_a_late_session_is_closed_and_never_used(
    ranks: Ranks, members: tuple[int, ...], path: Any, kind: type[faulty.Good]
) -> None:
    lives = run_lives(ranks, members, path(kind), SHORT_TIMEOUT_S)
    raises = kind is faulty.ConnectRaisesAndPeersHang
    for rank, life in enumerate(lives):
        assert candidate(life, "first")["verdict"] == "failed"
        assert served_by(life) == ["second", "torch_distributed"]
        if raises:
            assert "no route to the peer" in candidate(life, "first")["reason"]
        else:
            assert f"hasn't returned after {SHORT_TIMEOUT_S} s" in candidate(life, "first")["reason"]
        if kind is faulty.ConnectHangs:
            assert candidate(life, "first")["rank"] == 1
        if kind is faulty.ConnectHangsInExchange and candidate(life, "first")["rank"] == 0:
            assert "it waits for rank 1 (2 in the job)" in candidate(life, "first")["reason"]
        if (rank == 1) != raises:
            late = life.log[[name for name, _, _ in life.log].index("first")]
            assert [event for name, session, event in life.log if session == late[1]] == [
                "connect",
                "close orderly=False",
            ]
        # Nothing hangs the second time.
        assert served_by(life, turn=1) == ["second" if raises else "first", "torch_distributed"]


@pytest.mark.parametrize("members", [(1, 2)], indirect=True)
def test_an_admission_test_that_hangs(ranks: Ranks, members: tuple[int, ...], path: Any) -> None:
    for life in run_lives(ranks, members, path(faulty.SumHangs), SHORT_TIMEOUT_S):
        assert candidate(life, "first")["verdict"] == "failed"
        assert "the admission test of first hasn't returned" in candidate(life, "first")["reason"]
        assert served_by(life) == ["second", "torch_distributed"]
        assert served_by(life, turn=1) == ["first", "torch_distributed"]


@pytest.mark.parametrize("members", [(0, 1, 2)], indirect=True)
def test_one_wrong_dtype_goes_to_the_next_backend(ranks: Ranks, members: tuple[int, ...], path: Any) -> None:
    for life in run_lives(ranks, members, path(faulty.SumsBf16Wrong)):
        assert served_by(life, "bfloat16") == ["second", "torch_distributed"]
        assert served_by(life, "float32") == ["first", "torch_distributed"]
        first = candidate(life, "first")
        assert first["verdict"] == "serves"
        reason = "except for eager bfloat16: the admission test of all_reduce failed on rank 1: ArithmeticError"
        assert reason in first["reason"]


@pytest.mark.parametrize("members", [(1, 2)], indirect=True)
def test_a_close_that_raises_keeps_nothing_open(ranks: Ranks, members: tuple[int, ...], path: Any) -> None:
    for life in run_lives(ranks, members, path(faulty.CloseRaises)):
        assert served_by(life) == ["first", "torch_distributed"]


@pytest.mark.parametrize(
    ("members", "installed", "reason"),
    [
        ((1, 2), None, "not installed here, but installed on other ranks"),
        ((0, 1), "raise OSError('its library is missing')", "its import raised OSError: its library is missing"),
        ((0, 1, 2), "raise OSError('undefined symbol ' * 10_000)", "its import raised OSError: undefined symbol"),
        ((1, 2), "plugin = object()", "COMM_HOOK_API"),
    ],
    ids=["absent", "broken", "broken at length", "no plugin"],
    indirect=["members"],
)
def test_a_backend_that_one_rank_lacks(
    ranks: Ranks, tmp_path: Path, members: tuple[int, ...], path: Any, installed: str | None, reason: str
) -> None:
    folders = path(faulty.Good)
    second = folders[0][1]
    odd = [] if installed is None else [install(tmp_path / "odd", "first", installed)]
    folders = [[*odd, second] if job == members[1] else item for job, item in enumerate(folders)]
    for life in run_lives(ranks, members, folders):
        first = candidate(life, "first")
        assert (first["verdict"], first["rank"]) == ("unavailable", 1)
        assert reason in first["reason"]
        assert served_by(life) == ["second", "torch_distributed"]


@pytest.mark.parametrize("members", [(0, 1, 2)], indirect=True)
def test_versions_that_differ(ranks: Ranks, tmp_path: Path, members: tuple[int, ...], path: Any) -> None:
    folders = path(faulty.Good)
    newer = install(tmp_path / "newer", "first", faulty.source(faulty.Good, "first", 300), version="2.0")
    folders = [[newer, item[1]] if job == members[1] else item for job, item in enumerate(folders)]
    for life in run_lives(ranks, members, folders):
        first = candidate(life, "first")
        assert first["verdict"] == "unavailable"
        assert "its version differs between ranks: {1: '2.0', others: '1.0'}" in first["reason"]
        assert served_by(life) == ["second", "torch_distributed"]


def test_a_plugin_that_changes_its_topology_harms_no_other(ranks: Ranks, tmp_path: Path) -> None:
    first = faulty.install_kind(tmp_path / "first", topology_plugins.ClearsFacts, "first", 300, on=[1])
    second = faulty.install_kind(tmp_path / "second", topology_plugins.NeedsFacts, "second", 200)
    for life in run_lives(ranks, (0, 1), [[first, second]] * 2):
        verdicts = {item["name"]: (item["verdict"], item["reason"]) for item in life.decisions[0]["candidates"]}
        assert verdicts["first"][0] == "serves"
        assert verdicts["second"][0] == "standby", verdicts


def test_without_another_backend_torch_distributed_serves(ranks: Ranks, tmp_path: Path) -> None:
    first = faulty.install_kind(tmp_path, faulty.ConnectRaisesBetween, "first", 300, on=[1])
    for life in run_lives(ranks, (0, 1), [[first]] * 2):
        assert served_by(life) == ["torch_distributed"]
