"""One run of the benchmark on one rank: connect the contenders, measure every case, return the record."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import comm_core as comm
import torch

from comm_bench import stats
from comm_bench.cases import BenchCase
from comm_bench.conditions import clocks, machine
from comm_bench.contenders import Contender, Job
from comm_bench.document import SCHEMA, Listener, with_results
from comm_bench.measure import Measured, Procedure, measure
from comm_bench.results import Row, title, with_ratios
from comm_bench.roster import assemble

__all__ = ["measure_all"]


def measure_all(
    cases: Callable[[str], Sequence[BenchCase]],
    command: Sequence[str],
    procedure: Procedure,
    only: Sequence[str],
    listener: Listener,
    *,
    extras: bool = True,
    limit_s: float | None = None,
    before: Callable[[Job, Sequence[Contender], Callable[[BenchCase, str, str], None]], None] | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Measure every case with each contender that supports it. Collective in the world group.

    Args:
        cases: returns the cases to measure on a device type.
        command: the command line, for the record.
        procedure: the settings.
        only: names of the backends and peers to measure; empty for all.
        listener: gets this rank's progress.
        extras: whether peers and limits are measured, too.
        limit_s: the time in seconds in which the cases, each as long as the longest so far, have to end; None: no
            limit. The document then has the number of `unmeasured` cases.
        before: called before the first case, within the limit, with the ranks, the contenders, and the function to
            call with a case, the name of a contender that fails in it, and the reason.

    Returns:
        The document, see `comm_bench.document`, and its rows; equal on all ranks.

    Raises:
        ValueError: there is no case to measure.
    """
    started = dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds")
    job = Job(comm.get_backend(wire="").device)
    todo = cases(job.device.type)
    if not todo:
        raise ValueError("there is no size to measure; check -b, -e, --tokens and --hidden")
    widest = max((case.shape[1] for case in todo if case.fused), default=0)
    ops = dict.fromkeys(case.op for case in todo)
    roster = assemble(job, tuple(ops), max(case.nbytes for case in todo), widest, only, extras=extras)
    for (hidden_size, dtype), num_tokens in _largest(todo).items():
        roster.prepare(comm.Shapes(num_tokens, hidden_size, getattr(torch, dtype)))
    dropped: list[dict[str, str]] = []
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "comm_core": comm.__version__,
        "started": job.all_gather(started)[0],  # the ranks' clocks differ
        "command": list(command),
        "machine": machine(roster.topology),
        "clocks": {"before": job.all_gather(clocks(job))},
        "settings": {**dataclasses.asdict(procedure), "confidence": stats.interval(procedure.repetitions)[1]},
        "absent": roster.absent,
        "dropped": dropped,
    }
    listener.on_start(document)
    # Torch collects garbage before every capture. Without the freeze, this process's many live objects make that take
    # seconds per case.
    gc.collect()
    gc.freeze()

    def drop(case: BenchCase, name: str, reason: str) -> None:
        where = f"{title(case.op, case.mode, case.place)}, {case.dtype}, {case.nbytes} B"
        dropped.append({"name": name, "where": where, "reason": reason})
        listener.on_drop(name, where, reason)

    rows: list[Row] = []
    begun, longest_s = time.monotonic(), 0.0
    if limit_s is not None:
        document["unmeasured"] = 0
    if before is not None:
        before(job, roster.contenders, drop)
    for number, case in enumerate(todo, 1):
        started_s = time.monotonic()
        # The first rank decides: the ranks' clocks differ.
        if limit_s is not None and job.all_gather(started_s - begun + longest_s)[0] > limit_s:
            document["unmeasured"] = len(todo) - number + 1
            break
        listener.on_case_start(number, len(todo), case)
        measured = measure(job, case, roster.contenders, procedure, functools.partial(drop, case))
        found = with_ratios(_row(each, job) for each in measured)
        listener.on_case_end(found)
        rows += found
        longest_s = max(longest_s, time.monotonic() - started_s)
    gc.unfreeze()
    document["clocks"]["after"] = job.all_gather(clocks(job))
    roster.close()
    job.close()
    return with_results(document, rows), rows


def _largest(todo: Sequence[BenchCase]) -> dict[tuple[int, str], int]:
    """Return the largest number of tokens among the fused cases, by hidden size and dtype."""
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
        composed=contender.composes(measured.case),
    )
