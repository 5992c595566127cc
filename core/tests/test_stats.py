"""`Backend.stats`: each call counts once, for the route and the backend that served it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import faulty_plugins
import pytest
import recording_plugins as recording
import stats_ranks
import torch
from comm_core._handle import lookup
from comm_core._handle.lookup import FusedRoutes
from comm_core._plan.explain import explain
from comm_core.errors import CommError
from comm_core.stats import RouteStats, WaitStats
from comm_core.topology import Host, RankInfo, Topology
from comm_core.types import TERMINAL, Range
from fake_handle import ALL_REDUCE, FUSED, Fake, aligned, one_backend
from test_backend_fused import known_or_found

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks


def by_backend(stats: tuple[RouteStats, ...]) -> dict[tuple[str, str, str], tuple[int, int]]:
    """The eager calls on the CPU and their bytes, by operation, dtype and backend."""
    assert all((item.mode, item.device_type) == ("eager", "cpu") for item in stats)
    return {(item.op, item.dtype, item.backend): (item.calls, item.nbytes) for item in stats}


def test_nothing_is_counted_before_the_first_call() -> None:
    backend, *_ = one_backend()
    assert backend.stats() == ()
    assert "calls so far" not in backend.explain()


@pytest.mark.parametrize("calls", [1, lookup._CHECKED_CALLS, 100])
def test_calls_count_once_however_they_are_served(calls: int) -> None:
    backend, fast, last = one_backend(Range(ALL_REDUCE, max_nbytes=64))
    small, large, odd = aligned(16), aligned(17), aligned(16, offset=1)
    for _ in range(calls):
        backend.all_reduce(small)
        backend.all_reduce(small, out=torch.empty_like(small))
        backend.all_reduce(odd)  # staged through a copy
        backend.all_reduce(large)
        backend.all_reduce(aligned(8).view(2, 4).T)  # likewise
        backend.all_reduce(torch.view_as_complex(aligned(16).view(8, 2)))
        backend.all_reduce(aligned(0))
    assert (len(fast.calls), len(last.calls)) == (6 * calls, calls)
    assert by_backend(backend.stats()) == {
        # The empty tensor takes its turn as one zero.
        (ALL_REDUCE, "float32", "fast"): (6 * calls, (4 * 64 + 32 + 4) * calls),
        (ALL_REDUCE, "float32", TERMINAL): (calls, 68 * calls),
    }


def test_reading_changes_nothing() -> None:
    backend, *_ = one_backend()
    for number in range(1, 40):
        backend.all_reduce(aligned(4))
        assert backend.stats() == backend.stats()
        assert backend.stats()[0].calls == number


def test_a_refused_call_is_not_counted() -> None:
    backend, *_ = one_backend()
    with pytest.raises(ValueError, match="out"):
        backend.all_reduce(aligned(4), out=torch.empty(5))
    assert backend.stats() == ()


def test_a_failed_handle_keeps_its_counts() -> None:
    backend, fast, _ = one_backend()
    backend.all_reduce(aligned(4))
    fast.error = RuntimeError("broken")
    with pytest.raises(CommError):
        backend.all_reduce(aligned(4))
    with pytest.raises(CommError):
        backend.all_reduce(aligned(4))
    # The call that failed had begun; the one after it was refused.
    assert by_backend(backend.stats()) == {(ALL_REDUCE, "float32", "fast"): (2, 32)}


def fused(backend: Any, calls: int) -> None:
    for _ in range(calls):
        x = aligned(16).view(2, 8)
        backend.all_reduce_add_rms_norm(x, aligned(16).view(2, 8), aligned(8))


def test_a_fused_call_counts_for_the_backend_that_serves_it() -> None:
    backend, fast, _ = one_backend()
    fused(backend, 40)
    assert len(fast.calls) == 40
    assert by_backend(backend.stats()) == {(FUSED, "float32", "fast"): (40, 40 * 64)}


def test_a_composed_call_and_its_all_reduce_count() -> None:
    backend, fast, _ = one_backend(Range(ALL_REDUCE))
    fused(backend, 40)
    assert len(fast.calls) == 40
    assert by_backend(backend.stats()) == {
        (ALL_REDUCE, "float32", "fast"): (40, 40 * 64),
        (FUSED, "float32", TERMINAL): (40, 40 * 64),
    }


@pytest.mark.parametrize("declines", [True, False])
def test_a_hook_that_takes_any_operands_counts_what_it_serves(declines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "fit", staticmethod(lambda *_: not declines))
    monkeypatch.setattr(FusedRoutes, "get", known_or_found)
    backend, fast, _ = one_backend()
    fused(backend, 40)
    assert (fast.declined > 0) == declines
    composed = {(ALL_REDUCE, "float32", "fast"): (40, 40 * 64), (FUSED, "float32", TERMINAL): (40, 40 * 64)}
    served = {(FUSED, "float32", "fast"): (40, 40 * 64)}
    assert by_backend(backend.stats()) == (composed if declines else served)


def test_calls_over_a_wire_count_apart_and_are_marked() -> None:
    backend, *_ = one_backend(Range(ALL_REDUCE), Range(ALL_REDUCE, min_nbytes=64, wire="fp8"), wire="fp8")
    for _ in range(40):
        backend.all_reduce(aligned(4))
        backend.all_reduce(aligned(17))
    fused(backend, 40)  # its sum has 64 bytes
    sums = [(ALL_REDUCE, "fast", "", 40, 40 * 16), (ALL_REDUCE, "fast", "fp8", 80, 40 * (68 + 64))]
    found = [(item.op, item.backend, item.wire, item.calls, item.nbytes) for item in backend.stats()]
    assert found == [*sums, (FUSED, TERMINAL, "", 40, 40 * 64)]
    lines = backend.explain().partition("calls so far")[2].splitlines()
    assert [re.split("  +", line)[4] for line in lines] == ["backend", "fast", "fast over an fp8 wire", TERMINAL]


def test_an_explanation_has_a_line_for_each_route_that_was_used() -> None:
    backend, *_ = one_backend(Range(ALL_REDUCE, max_nbytes=64))
    for numel in (4, 16, 17):
        backend.all_reduce(aligned(numel))
    stats = (*backend.stats(), RouteStats(FUSED, "graph", "cuda", "bfloat16", "fast", 160, 5 << 20))
    lines = explain("g", backend.topology, backend.decision, stats).splitlines()
    assert lines[:-5] == explain("g", backend.topology, backend.decision).splitlines()
    assert [line.split() for line in lines[-5:]] == [
        [],
        ["calls", "so", "far", "mode", "device", "dtype", "backend", "calls", "size", "of", "all"],
        [ALL_REDUCE, "eager", "cpu", "float32", "fast", "2", "80", "B"],
        [ALL_REDUCE, "eager", "cpu", "float32", TERMINAL, "1", "68", "B"],
        [FUSED, "graph", "cuda", "bfloat16", "fast", "160", "5", "MiB"],
    ]


def test_all_ranks_count_the_same_also_after_a_new_decision_and_a_close(ranks: Ranks, tmp_path: Path) -> None:
    path = [
        faulty_plugins.install_kind(tmp_path / "first", recording.Prepares, "first", 300),
        faulty_plugins.install_kind(tmp_path / "second", faulty_plugins.Good, "second", 200),
    ]
    results = ranks.run(stats_ranks.count, world_size=2, path=[path] * 2)
    assert all(all(found["right"]) for found in results)
    first, second = results
    assert first["stats"] == second["stats"]
    assert first["explained"] == second["explained"]
    assert "calls so far" not in first["silent"]
    fresh, called, prepared, closed = map(by_backend, first["stats"])
    assert fresh == {}
    assert called == prepared
    sums = {numel: 4 * numel * calls for numel, calls in stats_ranks.CALLS.items()}
    for counts, times in ((called, 1), (closed, 2)):
        calls, nbytes = Counter[str](), Counter[str]()
        for (op, dtype, _), (count, size) in counts.items():
            calls[f"{op} {dtype}"] += count
            nbytes[f"{op} {dtype}"] += size
        # Every fused call is composed of an all-reduce and a norm.
        assert calls == {
            "all_reduce float32": times * (sum(stats_ranks.CALLS.values()) + 20),
            "all_reduce bool": times,
            "all_reduce_add_rms_norm float32": times * 20,
        }
        assert nbytes == {
            "all_reduce float32": times * (sum(sums.values()) + 20 * 64),
            "all_reduce bool": times * 5,
            "all_reduce_add_rms_norm float32": times * 20 * 64,
        }
    # What the second backend served before the first one was prepared, that one serves after it.
    assert called[ALL_REDUCE, "float32", "second"][0] >= stats_ranks.CALLS[64]
    assert closed[ALL_REDUCE, "float32", "first"][0] > called[ALL_REDUCE, "float32", "first"][0]


def test_explain_lists_the_waits_the_longest_peer_first() -> None:
    backend, *_ = one_backend()
    waits = [WaitStats("shm", 1, 3, 1200.4, 900.0), WaitStats("shm", 2, 70, 5000.0, 400.0)]
    topology = Topology.of([RankInfo(rank + 4, Host("one", "1")) for rank in range(3)])
    lines = [" ".join(line.split()) for line in explain("g", topology, backend.decision, (), waits).splitlines()[-3:]]
    assert lines == [
        "waited for in waits us of all longest us",
        "rank 2 (6 in the job) shm 70 5000 400",
        "rank 1 (5 in the job) shm 3 1200 900",
    ]


def test_waits_of_two_sessions_of_one_backend_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, *_ = one_backend()
    (session,) = backend._serving.all_sessions
    hooks = {**session.plugin.hooks, "waits": lambda _: {0: (0, 0.0, 0.0), 1: (2, 30.0, 20.0)}}
    plugin = dataclasses.replace(session.plugin, hooks=hooks)
    assert backend.waits() == ()
    monkeypatch.setattr(
        backend._serving, "all_sessions", [dataclasses.replace(session, plugin=plugin) for _ in range(2)]
    )
    assert backend.waits() == (WaitStats(plugin.name, 1, 4, 60.0, 20.0),)
