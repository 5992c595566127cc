"""`comm-core tune`: measure the backends and their variants in this group, and keep what pays off for later jobs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comm_core.command import contention, joined, launch, size, table, under_torchrun
from comm_core.types import TERMINAL, Decision

from comm_bench import stats
from comm_bench.cases import OPS, BenchCase, shapes, sizes
from comm_bench.document import Listener
from comm_bench.progress import Progress
from comm_bench.winners import Comparison, rules_of

if TYPE_CHECKING:
    from comm_core.tuned import TunedTable

    from comm_bench.contenders import Contender, Job

__all__ = ["add_parser", "run"]

# The longest measurement, in seconds, set-up and the last case not included; and with --quick.
_LIMIT_S, _QUICK_LIMIT_S = 540.0, 50.0
_LARGEST_NBYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
_SMALLEST_NBYTES = 1 << 10
_HIDDEN_SIZE = 4096
# A second hidden size for the variants of fused calls, which have to suit all; without --quick.
_OTHER_HIDDEN_SIZE = 7168
_DTYPE = "bfloat16"
_WARMUP, _REPETITIONS = 3, 9
# Calls in a chain, where the time around it hardly counts; None: the benchmark's own numbers.
_CALLS = {"cuda": None, "cpu": 20}
# The factor between sizes with --quick, and the most variants of a message.
_QUICK_FACTOR = 4
_QUICK_VARIANTS = 8
# The part of the time in which the backends' variants are measured; what they don't need is left for the backends.
_VARIANTS_SHARE = 0.4


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "tune",
        help="measure this group's backends and their variants, and keep those that are faster at some sizes",
        description="Joins the job that torchrun started, or else starts processes on this host. Times the variants of "
        "every backend of the group, then the backends, and writes the choices and rules that pay off into a table in "
        "the user's cache. Later groups of this kind follow it, while the versions stay the same, unless "
        "COMM_CORE_TUNE is set.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="every fourth size, few variants; about a minute instead of up to ten"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the choices and rules; write no table")
    parser.add_argument("--json", action="store_true", help="print the table's JSON instead of text")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="processes to start (2)")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Measure and write the table; return 1 if an element was wrong, nothing could be measured or a process failed."""
    if (os.environ["WORLD_SIZE"] if under_torchrun() else str(args.nproc)) == "1" or args.nproc < 1:
        args.fail("a single rank has nothing to reduce; start at least two")
    # What is measured is the plan without rules. The ranks compare it, so all of them set it.
    os.environ["COMM_CORE_TUNE"] = "none"
    if not under_torchrun():
        return launch(args.nproc, args.arguments)
    with joined() as rank:
        if rank == 0 and (reason := contention()):
            sys.stderr.write(f"comm-core tune: the table may suit a busy machine alone: {reason}\n")
        return _tune(args, rank)


def _tune(args: argparse.Namespace, rank: int) -> int:
    import comm_core as comm
    from comm_core.env import Settings
    from comm_core.tuned import TunedTable, describe_group, describe_versions, save_table

    from comm_bench.measure import Procedure
    from comm_bench.session import measure_all
    from comm_bench.variants import Search, Tried, search

    backend = comm.get_backend(wire="")
    device_type = backend.device.type
    todo = cases(device_type, ops=_ops(backend.decision, device_type), quick=args.quick)
    repetitions = stats.MIN_SAMPLES if args.quick else _REPETITIONS
    procedure = Procedure(_CALLS[device_type], 1, _WARMUP, repetitions, checks=True)
    limit_s = _QUICK_LIMIT_S if args.quick else _LIMIT_S
    listener = Progress() if rank == 0 else Listener()
    tried = Tried()

    def tune_variants(job: Job, contenders: Sequence[Contender], drop: Callable[[BenchCase, str, str], None]) -> None:
        nonlocal tried
        settings = Search(
            messages(device_type, ops=list(dict.fromkeys(case.op for case in todo)), quick=args.quick),
            procedure,
            _QUICK_VARIANTS if args.quick else None,
            limit_s * _VARIANTS_SHARE,
        )
        tried = search(job, contenders, settings, listener.on_case_start, drop)

    document, rows = measure_all(
        lambda _: todo,
        ["comm-core", *args.arguments],
        procedure,
        (),
        listener,
        extras=False,
        limit_s=limit_s,
        before=tune_variants,
    )
    document["wrong"] += tried.wrong
    document["unmeasured"] += tried.unmeasured
    rules, comparisons = rules_of(rows, backend.decision, device_type)
    provenance = {
        **{name: document[name] for name in ("comm_core", "started", "command", "machine", "clocks", "settings")},
        **{name: document[name] for name in ("absent", "dropped", "wrong", "unmeasured")},
        "dtype": _DTYPE,
        "measured": list(map(_to_json, comparisons)),
        "variants": {name: list(map(_to_json, of_backend)) for name, of_backend in tried.compared.items()},
    }
    topology = backend.topology
    tuned = TunedTable(describe_group(topology), describe_versions(topology), rules, provenance, tried.choices)
    path = None
    if not args.dry_run and not document["wrong"] and rank in _first_ranks([info.host.id for info in topology.ranks]):
        path = save_table(tuned, Settings.read().cache_dir)
    if rank == 0:
        text = json.dumps(tuned.to_json(), indent=1) if args.json else _text(tuned, comparisons, provenance)
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        if path is not None:
            sys.stderr.write(f"comm-core tune: wrote {path}\n")
        if document["wrong"]:
            sys.stderr.write(f"comm-core tune: {document['wrong']} elements were wrong, so no table is written\n")
    return 1 if document["wrong"] else 0


def _ops(decision: Decision, device_type: str) -> tuple[str, ...]:
    """Return the operations with a choice: on CPUs, the fused one may have none but core's composition."""
    fuses = any(rule.backend != TERMINAL for route in decision.routes if route.op == OPS[1] for rule in route.rules)
    return OPS[: 2 if device_type == "cuda" or fuses else 1]


def cases(device_type: str, *, ops: Sequence[str], quick: bool) -> list[BenchCase]:
    """Return the cases to measure: sizes far apart first, so that a run that ends early has covered the range."""
    modes = ("eager", "graph") if device_type == "cuda" else ("eager",)
    found = (
        BenchCase(op, mode, "out", _DTYPE, device_type, shape)
        for nbytes, op, mode in itertools.product(_ordered_sizes(device_type, quick=quick), ops, modes)
        for shape in shapes(op, _DTYPE, [nbytes], (), (_HIDDEN_SIZE,))
    )
    return list(dict.fromkeys(found))


def messages(device_type: str, *, ops: Sequence[str], quick: bool) -> list[list[BenchCase]]:
    """Return the messages of which variants are measured, in the order of `cases`."""
    # A backend has one choice for both modes; in graphs, times vary less.
    mode = "graph" if device_type == "cuda" else "eager"
    found = []
    for case in cases(device_type, ops=ops, quick=quick):
        if case.mode == mode:
            of_message = [case]
            # Of 7/8 as many bytes, and of a number of rows that serving engines capture.
            if case.fused and case.shape[0] % 2 == 0 and not quick:
                of_message.append(dataclasses.replace(case, shape=(case.shape[0] // 2, _OTHER_HIDDEN_SIZE)))
            found.append(of_message)
    return found


def _ordered_sizes(device_type: str, *, quick: bool) -> list[int]:
    """Return the sizes in bytes, those far apart first."""
    sweep = list(sizes(_SMALLEST_NBYTES, _LARGEST_NBYTES[device_type], _QUICK_FACTOR if quick else 2, 0))
    between = [] if quick else [nbytes * 3 // 2 for nbytes in sweep[:-1]]
    return list(dict.fromkeys([*sweep[::4], sweep[-1], *sweep[2::4], *sweep[1::2], *between]))


def _first_ranks(hosts: Sequence[str]) -> set[int]:
    """Return the first rank of each host, to write the table there."""
    return {hosts.index(host) for host in hosts}


def _to_json(comparison: Comparison) -> dict[str, Any]:
    medians = {name: round(statistics.median(times), 3) for name, times in comparison.times_us.items()}
    return {**dataclasses.asdict(comparison), "times_us": medians}


def _text(tuned: TunedTable, comparisons: Sequence[Comparison], document: Mapping[str, Any]) -> str:
    """Return the measured messages, the rules and the variants as text."""
    lines: list[tuple[str, ...]] = [("operation", "mode", "size", "planned", "us", "fastest", "us")]
    for comparison in comparisons:
        medians = {name: statistics.median(times) for name, times in comparison.times_us.items()}
        fastest = min(medians, key=lambda name: medians[name], default="-")
        cells = [
            cell
            for name in (comparison.planned, fastest)
            for cell in (name, f"{medians[name]:.1f}" if name in medians else "-")
        ]
        lines.append((comparison.op, comparison.mode, size(comparison.nbytes), *cells))
    text = [table(lines), ""]
    if document["unmeasured"]:
        text.append(f"The time was over before {document['unmeasured']} cases were measured.")
    text += [f"not measured: {name}: {reason}" for name, reason in document["absent"].items()]
    text.append("Rules:" if tuned.rules else "No rule pays off: the backends' own order stays.")
    text += [f"  {rule}" for rule in tuned.rules]
    for name in document["variants"]:
        chosen = tuned.variants.get(name, ())
        text.append(f"Variants of {name}:" if chosen else f"No variant of {name} pays off: its own table stays.")
        text += [f"  {choice}" for choice in chosen]
    return "\n".join(text)
