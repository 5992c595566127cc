#!/usr/bin/env python3
"""Times both algorithms of customar_v1 in every shape of launch that makes sense, as `customar_v2_tune.py` does.

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
# (from bytes, to bytes, vectors a thread, threads, blocks): what is worth a look where.
GRIDS = (
    (0, 64 * _K, (1,), (64, 128, 256, 512), (264,)),
    (64 * _K + 1, 1024 * _K, (1, 2, 4), (128, 256, 512), (16, 24, 32, 48, 64, 132)),
    (1024 * _K + 1, policy.MAX_NBYTES, (1, 2, 4), (256, 512), (32, 48, 64, 132, 264)),
)


class Adapter:
    """A session with the names that `customar_v2_tune.Chain` calls."""

    def __init__(self, own: session.Session) -> None:
        self.own = own

    def all_reduce_out(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Sum."""
        self.own.all_reduce_out(tensor, out)

    def use(self, rows: list[Any]) -> None:
        """Serve by these rows; the chain's own row for meetings isn't one of this backend's."""
        mine = [row if isinstance(row, policy.Row) else policy.Row(1 << 40, "one_stage", threads=32) for row in rows]
        self.own.set_rows(mine)


def shapes(nbytes: int, world_size: int) -> list[policy.Row]:
    """The shapes of launch that are worth a look at a size; those that come out the same once."""
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


def text_of(row: policy.Row) -> str:
    """A row as the option takes it."""
    return f"{row.algorithm}:vecs={row.vecs},threads={row.threads},blocks={row.blocks}"


def measure(options: argparse.Namespace, own: Adapter) -> list[dict[str, Any]]:
    """This rank's line for every size and shape."""
    world_size = dist.get_world_size()
    lines: list[dict[str, Any]] = []
    for nbytes in map(tune.parse_size, options.sizes.split(",")):
        chain = tune.Chain(own, nbytes // 2, torch.bfloat16, tune.calls_of(nbytes, world_size))
        for row in shapes(nbytes, world_size):
            if not options.only or re.search(options.only, text_of(row)):
                took_us, right = chain.time_us(row, options.replays)
                lines.append({"nbytes": nbytes, "row": text_of(row), "us": took_us, "right": right})
                own.own.check()
    return lines


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Time both algorithms of customar_v1 in every shape.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for tune.json")
    parser.add_argument("--sizes", default=SIZES, help=f"bytes, comma-separated (default {SIZES})")
    parser.add_argument("--only", default="", help="a regular expression that a shape's text must contain")
    parser.add_argument("--replays", type=int, default=9, help="of each graph; the median counts")
    parser.add_argument("--top", type=int, default=4, help="shapes printed a size")
    options = parser.parse_args()
    started = time.monotonic()
    module = tune.joined("comm_plugin_customar_v1")
    own = session.connect(module, None, tune.group_context())
    torch.cuda.set_stream(torch.cuda.Stream())  # what captures can't be the default stream
    everyone = tune.Control().all_gather(measure(options, Adapter(own)))
    if dist.get_rank() == 0:
        tune.report(everyone, options, time.monotonic() - started, dtype="bfloat16")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
