#!/usr/bin/env python3
"""Time calls on padded batches: graphs of a bucket of rows with `num_tokens`, beside graphs of exactly the real rows.

    torchrun --nproc-per-node 2 benchmarks/padded.py [--bucket 512] [--rows 1,8,32,128,512] [--json record.json]

A graph holds 50 dependent calls of one operation in bfloat16, and in each round all graphs are replayed in turn; a
round's time is the slowest rank's. A row has the rounds' medians, in microseconds a call: `exact_us` for the graph of
so many rows, `padded_us` for that of the bucket, replayed with so many real rows, and `bucket_us` for that of the
bucket without a number. Without GPUs calls are eager, which only shows that the program runs.
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
from torchrun_job import describe, join, leave, medians_us, replay_of, write

DTYPE = torch.bfloat16
CALLS = 50
OPS = ("all_reduce", "all_reduce_add_rms_norm")


def chain(backend: comm.Backend, op: str, rows: int, hidden: int, counts: comm.TokenCounts | None) -> Callable[[], Any]:
    """Return a function that makes dependent calls."""
    x = torch.zeros(rows, hidden, device=backend.device, dtype=DTYPE)
    other, residual = torch.empty_like(x), torch.randn_like(x)
    weight = torch.full((hidden,), 0.01, device=backend.device, dtype=DTYPE)

    def call() -> None:
        tensors = (x, other)
        for number in range(CALLS):
            source, target = tensors[number % 2], tensors[1 - number % 2]
            if op == OPS[0]:
                backend.all_reduce(source, target, num_tokens=counts)
            else:
                backend.all_reduce_add_rms_norm(
                    source, residual, weight, out=target, residual_out=residual, num_tokens=counts
                )

    return replay_of(call, backend.device)


def measure(backend: comm.Backend, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all operations and numbers of rows; return the record's rows. Collective."""
    every = [int(rows) for rows in options.rows.split(",")]
    counts = comm.TokenCounts(options.bucket, 0, 1, backend.device)
    counts.fill(options.bucket)
    runs: dict[tuple[str, int, bool], Callable[[], Any]] = {}
    for op in OPS:
        padded = chain(backend, op, options.bucket, options.hidden, counts)
        for rows in {*every, options.bucket}:
            runs[op, rows, False] = chain(backend, op, rows, options.hidden, None)
            runs[op, rows, True] = padded
    medians = medians_us(runs, options, on_gpu=backend.device.type == "cuda", before=lambda key: counts.fill(key[1]))
    backend.check()
    us_of = {key: round(us / CALLS, 3) for key, us in medians.items()}
    found = []
    for op, rows in itertools.product(OPS, every):
        exact, padded_us = us_of[op, rows, False], us_of[op, rows, True]
        row = {"op": op, "rows": rows, "exact_us": exact, "padded_us": padded_us}
        found.append(row | {"bucket_us": us_of[op, options.bucket, False], "ratio": round(padded_us / exact, 3)})
    return found


def main() -> int:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bucket", type=int, default=512, help="rows of the padded batch (default 512)")
    parser.add_argument("--rows", default="1,8,32,128,512", help="real rows (default 1,8,32,128,512)")
    parser.add_argument("--hidden", type=int, default=4096, help="elements of a row (default 4096)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which all graphs take turns (default 30)")
    parser.add_argument("--replays", type=int, default=20, help="replays timed together (default 20)")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    join(parser)
    backend = comm.get_backend()
    document = {
        **describe(backend.topology),
        "settings": {"bucket": options.bucket, "hidden": options.hidden, "dtype": "bfloat16", "calls": CALLS}
        | {"rounds": options.rounds, "replays": options.replays},
        "rows": measure(backend, options),
    }
    write(document, options.json)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
