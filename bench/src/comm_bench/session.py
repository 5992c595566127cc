"""One run of the benchmark on one rank: who takes part, every case in turn, and the record of it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
from collections.abc import Callable, Sequence
from typing import Any

import comm_core as comm
import torch

from comm_bench import stats
from comm_bench.cases import BenchCase
from comm_bench.conditions import clocks, machine
from comm_bench.contenders import Job
from comm_bench.document import SCHEMA, Listener, closed
from comm_bench.measure import Measured, Procedure, measure
from comm_bench.results import Row, rows_of, title
from comm_bench.roster import assemble

__all__ = ["measure_all"]


def measure_all(
    cases: Callable[[str], Sequence[BenchCase]],
    command: Sequence[str],
    procedure: Procedure,
    only: Sequence[str],
    listener: Listener,
) -> tuple[dict[str, Any], list[Row]]:
    """Measure every case with everybody who takes it. Collective in the world group.

    Args:
        cases: what to measure, for tensors of a device type.
        command: for the record.
        procedure: how to measure.
        only: names of backends and peers; empty for all.
        listener: hears how it goes on, on this rank.

    Returns:
        The document, which `comm_bench.document` describes, and its rows; equal on all ranks.

    Raises:
        ValueError: no case is left.
    """
    started = dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds")
    job = Job(comm.get_backend().device)
    todo = cases(job.device.type)
    if not todo:
        raise ValueError("no size is left to measure: see -b, -e, --tokens and --hidden")
    widest = max((case.shape[1] for case in todo if case.fused), default=0)
    ops = dict.fromkeys(case.op for case in todo)
    roster = assemble(job, tuple(ops), max(case.nbytes for case in todo), widest, only)
    for (hidden_size, dtype), num_tokens in _largest(todo).items():
        roster.prepare(comm.Shapes(num_tokens, hidden_size, getattr(torch, dtype)))
    dropped: list[dict[str, str]] = []
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "comm_core": comm.__version__,
        "started": started,
        "command": list(command),
        "machine": machine(roster.topology),
        "clocks": {"before": job.gather(clocks(job))},
        "settings": {**dataclasses.asdict(procedure), "confidence": stats.interval(procedure.repetitions)[1]},
        "absent": roster.absent,
        "dropped": dropped,
    }
    listener.begins(document)
    # Torch collects garbage before every capture, and this process has much that is none: seconds a case.
    gc.collect()
    gc.freeze()
    rows: list[Row] = []
    for number, case in enumerate(todo, 1):
        listener.measures(number, len(todo), case)

        def drop(name: str, reason: str, case: BenchCase = case) -> None:
            where = f"{title(case.op, case.mode, case.place)}, {case.dtype}, {case.nbytes} B"
            dropped.append({"name": name, "where": where, "reason": reason})
            listener.drops(name, where, reason)

        found = rows_of(_row(each, job) for each in measure(job, case, roster.contenders, procedure, drop))
        listener.measured(found)
        rows += found
    gc.unfreeze()
    document["clocks"]["after"] = job.gather(clocks(job))
    roster.close()
    job.close()
    return closed(document, rows), rows


def _largest(todo: Sequence[BenchCase]) -> dict[tuple[int, str], int]:
    """By hidden size and dtype, the most tokens of the fused operation's cases."""
    found: dict[tuple[int, str], int] = {}
    for case in todo:
        if case.fused:
            num_tokens, hidden_size = case.shape
            found[hidden_size, case.dtype] = max(found.get((hidden_size, case.dtype), 1), num_tokens)
    return found


def _row(measured: Measured, job: Job) -> Row:
    contender = measured.contender
    return Row(
        contender.name,
        contender.kind,
        measured.case,
        job.world_size,
        measured.calls,
        measured.restarts,
        measured.copy_us,
        measured.spacer_us,
        measured.times_us,
        measured.wrong,
    )
