"""Made-up rows and documents."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from comm_bench import stats
from comm_bench.cases import BenchCase
from comm_bench.document import SCHEMA, with_results
from comm_bench.results import Row, with_ratios
from comm_core.types import TERMINAL

REPETITIONS = 7
# The rounding of times in the JSON, in microseconds.
STEP_US = 1e-4
KINDS = {TERMINAL: "terminal", "mine": "backend", "other": "backend", "peer": "peer"}


def row(name: str = TERMINAL, time_us: float = 10.0, **changes: Any) -> Row:
    """Make a row of a 2 MB message over four ranks."""
    original = Row(
        name,
        KINDS.get(name, "limit"),
        BenchCase("all_reduce", "eager", "out", "bfloat16", "cpu", (1_000_000,)),
        world_size=4,
        calls=5,
        restarts=0 if name.startswith("limit") else 1,
        copy_us=0.0 if name.startswith("limit") else 0.25,
        spacer_us=0.0,
        times_us=(time_us,) * REPETITIONS,
        wrong=None if name.startswith("limit") else 0,
    )
    return dataclasses.replace(original, **changes)


def sized(original: Row, count: int) -> Row:
    return dataclasses.replace(original, case=dataclasses.replace(original.case, shape=(count,)))


def document(rows: list[Row], **changes: Any) -> dict[str, Any]:
    """Make the record of a run on CPUs."""
    begun = {
        "schema": SCHEMA,
        "comm_core": "0.1.0",
        "started": "2026-01-02T03:04:05+00:00",
        "command": ["comm-core", "bench", "-n", "5"],
        "machine": {
            "ranks": 4,
            "device_type": "cpu",
            "hosts": 1,
            "devices": [],
            "versions": {"comm_core": "0.1.0", "python": "3.12.8", "torch": "2.13.0"},
        },
        "clocks": {"before": [{}] * 4, "after": [{}] * 4},
        "settings": {
            "calls": 5,
            "launches": 1,
            "warmup": 5,
            "repetitions": REPETITIONS,
            "checks": True,
            "confidence": stats.interval(REPETITIONS)[1],
        },
        "absent": {"away": "it isn't here"},
        "dropped": [{"name": "mine", "where": "all_reduce, eager, in place, bfloat16, 8 B", "reason": "rank 1: no"}],
    }
    return {**with_results(begun, rows), **changes}


def recorded() -> dict[str, Any]:
    """Make a document with a row of each kind, as read from a file."""
    rows = with_ratios([row(), row("mine", 5.0), row("peer", 8.0), row("limit:copy", 2.0)])
    found: dict[str, Any] = json.loads(json.dumps(document(rows)))
    return found


def on_gpus(found: dict[str, Any]) -> None:
    """Change a document to that of a run on GPUs."""
    found["machine"] |= {
        "device_type": "cuda",
        "devices": ["NVIDIA H200"] * 4,
        "nvlinks": None,
        "multiprocessors": 132,
        "l2_nbytes": 60 << 20,
        "l2": "warm",
        "dependent_launch": "as each kernel asks for it",
    }
    clocks = {"sm_mhz": 1980, "sm_max_mhz": 1980, "memory_mhz": 3201, "held_back_by": 1}
    found["clocks"] = {"before": [clocks] * 3 + [{"unknown": "NVMLError: Not Supported"}], "after": [clocks] * 4}
