#!/usr/bin/env python3
"""Time sums over the FP8 wire beside exact ones, in CUDA graphs.

    torchrun --nproc-per-node 2 benchmarks/wire.py [--mib 1,1.5,2,3,4,6,8,12,16,24,32,48,64] [--json record.json]

A graph holds 20 dependent calls in bfloat16, and in each round all graphs are replayed in turn; a round's time is the
slowest rank's. A row has the rounds' medians, in microseconds a call: `exact_us` and `wire_us`, how many times as fast
the latter is, and whether these calls take the wire, which depends on the machine and the size. Without GPUs calls are
eager, and no backend has the wire, which only shows that the program runs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from torchrun_job import describe, join, leave, medians_us, replay_of, write

DTYPE = torch.bfloat16
CALLS = 20
DEFAULT_MIB = "1,1.5,2,3,4,6,8,12,16,24,32,48,64"


def chain(backend: comm.Backend, numel: int) -> Callable[[], Any]:
    """Return a function that makes dependent calls: the first sums rank 0's random numbers, the others the last sum."""
    source = torch.randn(numel, device=backend.device).to(DTYPE)
    if dist.get_rank() != 0:
        source.zero_()
    targets = (torch.empty_like(source), torch.empty_like(source))

    def call() -> None:
        tensor = source
        for target in itertools.islice(itertools.cycle(targets), CALLS):
            tensor = backend.all_reduce(tensor, target)

    return replay_of(call, backend.device)


def takes_wire(backend: comm.Backend, nbytes: int) -> bool:
    """Return whether sums of this size are quantised on their way."""
    mode = "graph" if backend.device.type == "cuda" else "eager"
    route = backend.decision.route("all_reduce", mode, backend.device.type, "bfloat16")
    return next(bool(rule.wire) for rule in route.rules if rule.takes(nbytes))


def measure(exact: comm.Backend, wire: comm.Backend, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all sizes; return the record's rows. Collective."""
    found = []
    for mib in options.mib.split(","):
        numel = int(float(mib) * (1 << 20)) // DTYPE.itemsize
        runs = {"exact": chain(exact, numel), "wire": chain(wire, numel)}
        medians = medians_us(runs, options, on_gpu=exact.device.type == "cuda")
        us_of = {name: round(us / CALLS, 3) for name, us in medians.items()}
        nbytes, ratio = numel * DTYPE.itemsize, round(us_of["exact"] / us_of["wire"], 3)
        row = {"nbytes": nbytes, "exact_us": us_of["exact"], "wire_us": us_of["wire"], "times_as_fast": ratio}
        found.append(row | {"takes_wire": takes_wire(wire, nbytes)})
    exact.check()
    wire.check()
    return found


def main() -> int:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", default=DEFAULT_MIB, help=f"sizes of a message in MiB (default {DEFAULT_MIB})")
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which all graphs take turns (default 30)")
    parser.add_argument("--replays", type=int, default=5, help="replays timed together (default 5)")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    join(parser)
    exact = comm.get_backend(wire="")
    wire = comm.get_backend(dist.new_group(), wire="fp8")
    document = {
        **describe(exact.topology),
        "settings": {"dtype": "bfloat16", "calls": CALLS, "rounds": options.rounds, "replays": options.replays},
        "rows": measure(exact, wire, options),
    }
    write(document, options.json)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
