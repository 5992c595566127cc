#!/usr/bin/env python3
"""Time both algorithms of customar_v1 in all plausible launch shapes, in the manner of `customar_v2_tune.py`.

torchrun --nproc-per-node 2 benchmarks/customar_v1_tune.py --out FOLDER [--sizes 64K,128K,...] [--only REGEX]
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from pathlib import Path
from typing import Any

import customar_v2_tune as tune
import torch
import torch.distributed as dist
from comm_plugin_customar_v1 import policy, session

SIZES = "1K,2K,4K,8K,16K,32K,64K,128K,256K,512K,768K,1M,2M,4M,8M"
_K = 1 << 10
# The shapes to try: (from bytes, to bytes, vectors per thread, threads, blocks).
GRIDS = (
    (0, 64 * _K, (1,), (64, 128, 256, 512), (264,)),
    (64 * _K + 1, 1024 * _K, (1, 2, 4), (128, 256, 512), (16, 24, 32, 48, 64, 132)),
    (1024 * _K + 1, policy.MAX_NBYTES, (1, 2, 4), (256, 512), (32, 48, 64, 132, 264)),
)


class Adapter:
    """A session of customar_v1 with the methods that `customar_v2_tune.Chain` calls."""

    def __init__(self, own: session.Session) -> None:
        self.own = own

    def all_reduce_out(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Sum over the ranks."""
        self.own.all_reduce_out(tensor, out)

    def use(self, rows: list[Any]) -> None:
        """Use these rows. The chain's row for its barrier is customar_v2's; replace it by one of this backend."""
        mine = [row if isinstance(row, policy.Row) else policy.Row(1 << 40, "one_stage", threads=32) for row in rows]
        self.own.set_rows(mine)


def shapes(nbytes: int, world_size: int) -> list[policy.Row]:
    """Return the launch shapes to try at a size, without those that give the same launch."""
    found: dict[tuple[Any, ...], policy.Row] = {}
    for low, high, *choices in GRIDS:
        if not low <= nbytes <= high:
            continue
        for name, (vecs, threads, blocks) in itertools.product(policy.ALGORITHMS, itertools.product(*choices)):
            work = -(-nbytes // 16) // (world_size if name == "two_stage" else 1)
            grid = max(1, min(blocks, -(-work // (threads * vecs))))
            if vecs <= policy.max_vecs(world_size):
                found.setdefault((name, vecs, threads, grid), policy.Row(1 << 40, name, vecs, threads, blocks))
    return list(found.values())


def format_row(row: policy.Row) -> str:
    """Format a row as the plugin's option accepts it."""
    return f"{row.algorithm}:vecs={row.vecs},threads={row.threads},blocks={row.blocks}"


def measure(options: argparse.Namespace, own: Adapter) -> list[dict[str, Any]]:
    """Measure every size and shape, and return this rank's lines."""
    world_size = dist.get_world_size()
    lines: list[dict[str, Any]] = []
    for nbytes in map(tune.parse_size, options.sizes.split(",")):
        chain = tune.Chain(own, nbytes // 2, torch.bfloat16, tune.calls_for(nbytes, world_size))
        for row in shapes(nbytes, world_size):
            if not options.only or re.search(options.only, format_row(row)):
                took_us, right = chain.time_us(row, options.replays)
                lines.append({"nbytes": nbytes, "row": format_row(row), "us": took_us, "right": right})
                own.own.check()
    return lines


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Time both algorithms of customar_v1 in every shape.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for tune.json")
    parser.add_argument("--sizes", default=SIZES, help=f"bytes, comma-separated (default {SIZES})")
    parser.add_argument("--only", default="", help="a regular expression that a shape's text must contain")
    parser.add_argument("--replays", type=int, default=9, help="replays of each graph; the median counts")
    parser.add_argument("--top", type=int, default=4, help="number of shapes to print per size")
    options = parser.parse_args()
    started = time.monotonic()
    module = tune.join_job("comm_plugin_customar_v1")
    own = session.connect(module, None, tune.group_context())
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream can't capture
    everyone = tune.Control().all_gather(measure(options, Adapter(own)))
    if dist.get_rank() == 0:
        tune.report(everyone, options, time.monotonic() - started, dtype="bfloat16")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
