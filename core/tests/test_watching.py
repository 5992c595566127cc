"""What profilers and Prometheus see of a group's calls."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import faulty_plugins as faulty
import pytest
import torch
import torch.distributed as dist
from comm_core.prometheus import Collector
from prometheus_client import CollectorRegistry, generate_latest

if TYPE_CHECKING:
    from harness import Ranks


def profile_calls() -> list[str]:
    backend = comm.get_backend()
    x = torch.ones(2, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(20):  # checked calls, then those of the hot path
            backend.all_reduce(torch.ones(8))
        backend.all_reduce(torch.ones(1000))
        backend.all_reduce_add_rms_norm(x, x.clone(), torch.ones(8))
    comm.close()
    return [event.name for event in profiler.events() if event.name.startswith("comm_core")]


@pytest.mark.parametrize("on", [["1", "1"], ["0", "1"], ["", ""]])
def test_each_call_is_a_range_that_names_its_backend(ranks: Ranks, tmp_path: Path, on: list[str]) -> None:
    path = [[faulty.install_kind(tmp_path, faulty.Good, "first", 300)]] * 2
    found = ranks.run(profile_calls, path=path, env=[{"COMM_CORE_PROFILE": value} for value in on])
    for names, value in zip(found, on, strict=True):
        if value != "1":
            assert names == []
            continue
        assert len(names) == 22
        (tail,) = {name.split(" B, ")[1] for name in names}
        assert tail.startswith("group '")
        assert [name.split(" B, ")[0] for name in names] == [
            *["comm_core.all_reduce, first, 32"] * 20,
            "comm_core.all_reduce, torch_distributed, 4000",
            "comm_core.all_reduce, first, 64",  # of the composed call
        ]


def scrape_calls() -> dict[str, Any]:
    registry = CollectorRegistry()
    registry.register(Collector())
    texts = [generate_latest(registry).decode()]
    backend = comm.get_backend()
    done = threading.Event()
    scraped: list[str] = []

    def scrape() -> None:
        while not done.is_set():
            scraped.append(generate_latest(registry).decode())

    thread = threading.Thread(target=scrape)
    thread.start()
    for numel in range(1, 60):
        backend.all_reduce(torch.ones(numel))
    done.set()
    thread.join()
    texts.append(generate_latest(registry).decode())
    comm.close()
    texts.append(generate_latest(registry).decode())
    return {"texts": texts, "scraped": len(scraped), "rank": dist.get_rank(), "group": backend.group_name}


class Waiting(faulty.Good):
    """Has waited three times for the next rank."""

    @comm.hookimpl
    def waits(self, session: faulty.Session) -> dict[int, tuple[int, float, float]]:
        return {session.rank: (0, 0.0, 0.0), 1 - session.rank: (3, 5000.0, 2500.0)}


def metrics(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The values by metric and labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', name)))
            found.setdefault(name.partition("{")[0], {})[labels] = float(value)
    return found


def test_prometheus_gets_calls_bytes_and_waits(ranks: Ranks, tmp_path: Path) -> None:
    path = [[faulty.install_kind(tmp_path, Waiting, "first", 300)]] * 2
    for found in ranks.run(scrape_calls, path=path):
        before, after, closed = map(metrics, found["texts"])
        assert before == closed == {}
        assert found["scraped"] > 0
        group = {"group": found["group"], "rank": str(found["rank"])}
        call = {**group, "op": "all_reduce", "mode": "eager", "device": "cpu", "dtype": "float32", "backend": "first"}
        call["wire"] = ""
        wait = {**group, "backend": "first", "peer": str(1 - found["rank"])}

        def one(labels: dict[str, str], value: float) -> dict[tuple[tuple[str, str], ...], float]:
            return {tuple(sorted(labels.items())): value}

        assert after == {
            "comm_core_calls_total": one(call, 59),
            "comm_core_bytes_total": one(call, 4 * sum(range(1, 60))),
            "comm_core_waits_total": one(wait, 3),
            "comm_core_wait_seconds_total": one(wait, 0.005),
            "comm_core_longest_wait_seconds": one(wait, 0.0025),
            "comm_core_up": one({**group, "backend": "first"}, 1),
        }
