#!/usr/bin/env python3
"""Time every algorithm of customar_v2 in all plausible launch shapes, in CUDA graphs of dependent calls.

    torchrun --nproc-per-node 2 benchmarks/customar_v2_tune.py --out FOLDER [--sizes 1K,8K,...] [--only REGEX]

For each size and shape the program captures a graph of calls, each reading the previous one's output, and replays it
between two events. A call before each replay acts as a barrier, so that the ranks start together. The sums at the end
of the chain are checked. The program prints each size's best shapes by the slowest rank's median, and writes all to
FOLDER/tune.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import comm_core as comm
import comm_plugin_customar_v2 as plugin
import torch
import torch.distributed as dist
from comm_core import kernels
from comm_plugin_customar_v2 import layout, policy, session

SIZES = "1K,2K,4K,8K,16K,32K,64K,128K,256K,384K,512K,768K,1M,2M,4M,8M,16M,32M,64M"
#: Tokens and hidden sizes of models, bf16, for sizes that aren't powers of two.
MODELS = [(tokens, hidden) for tokens in (1, 3, 5, 7, 33, 129, 500) for hidden in (2880, 4096, 5120, 7168)]
WAIT_TIMEOUT_S = 5.0


def print_line(text: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Control:
    """The parts of `comm.ControlChannel` that `connect` needs, over a Gloo group."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def agree(self, ok: bool, reason: str = "") -> comm.Agreement:
        """Combine the ranks' votes."""
        votes = self.all_gather((ok, reason))
        return comm.Agreement(
            all(vote for vote, _ in votes), {r: why for r, (vote, why) in enumerate(votes) if not vote}
        )


def parse_size(text: str) -> int:
    """Parse "4K", "16M" or a plain number into bytes."""
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


# The shapes to try: (algorithm, from bytes, to bytes, vectors per thread, threads, blocks, pipeline depths).
_K, _M = 1 << 10, 1 << 20
GRIDS = (
    ("oneshot_push", 0, 64 * _K, (1,), (32, 64, 128, 256, 512), (264,), (0,)),
    ("oneshot_push", 0, 64 * _K, (2,), (32, 64, 128), (264,), (0,)),
    ("twoshot_push", 0, 64 * _K, (1,), (64, 128), (264,), (0,)),
    ("oneshot_push", 16 * _K, 4 * _M, (1, 2), (128, 256, 512, 1024), (66, 132, 264), (0,)),
    ("oneshot_push", 16 * _K, 4 * _M, (4,), (128, 256, 512), (66, 132, 264), (0,)),
    ("twoshot_push", 16 * _K, 4 * _M, (1, 2), (256, 512), (132,), (0, 1)),
    ("twoshot_push", 64 * _K, 4 * _M, (1,), (64, 128), (264,), (0,)),
    ("oneshot_stream", 16 * _K, _M - 1, (1, 2), (256, 512), (132,), (1,)),
    ("oneshot_push", 4 * _M + 1, 64 * _M, (4,), (256, 512), (132, 264), (0,)),
    ("oneshot_stream", _M, 64 * _M, (2, 4), (256, 512), (132, 264), (1, 2, 4, 9999)),
    ("twoshot_push", _M, 64 * _M, (1, 2, 4), (256, 512), (132, 264), (0, 1, 2, 9999)),
    ("twoshot_push", _M, 64 * _M, (1,), (1024,), (132,), (1, 9999)),
)


def max_threads(world_size: int, vecs: int) -> int:
    """Return the limit of threads in a block; `max_threads` in csrc/params.cuh."""
    if world_size == 2:
        return 512 if vecs >= 4 else 1024
    return 256 if (world_size - 1) * vecs >= 5 else 512


def shapes(nbytes: int, world_size: int) -> list[policy.Row]:
    """Return the launch shapes to try at a size, without those that give the same launch."""
    found: dict[tuple[Any, ...], policy.Row] = {}
    for algorithm, low, high, *choices in GRIDS:
        if not low <= nbytes <= high:
            continue
        work = -(-nbytes // 16) // (world_size if algorithm.startswith("twoshot") else 1)
        for vecs, threads, blocks, depth in itertools.product(*choices):
            block_vecs = threads * vecs
            grid = max(1, min(blocks, -(-work // block_vecs)))
            rounds = -(-work // (block_vecs * grid))
            if vecs > (4 if world_size == 2 else 1) or threads > max_threads(world_size, vecs):
                continue
            row = policy.Row(1 << 40, algorithm, vecs, threads, blocks, min(depth, rounds))
            found.setdefault((algorithm, vecs, threads, grid, row.pipeline_depth), row)
    return list(found.values())


@dataclasses.dataclass
class Chain:
    """A graph of dependent calls over two buffers, and its expected sums."""

    own: session.Session
    numel: int
    dtype: torch.dtype
    calls: int

    def __post_init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        world_size, rank = dist.get_world_size(), dist.get_rank()
        # Small integers times a power of two so small that a factor of W^calls stays in bfloat16's and float32's range.
        scale = 2.0**-110 if world_size == 2 else 2.0**-120
        base = torch.arange(self.numel, device=device, dtype=torch.float32) % 13
        terms = [((base + r) * scale).to(self.dtype) for r in range(world_size)]
        self.start = terms[rank]
        # After the first call all ranks hold the same values. Each call rounds once.
        for _ in range(self.calls):
            total = sum((term.float() for term in terms[1:]), terms[0].float())
            terms = [total.to(self.dtype)] * world_size
        self.expected = terms[0]
        self.buffers = [torch.empty_like(self.start), torch.empty_like(self.start)]
        self.barrier = torch.zeros(64, device=device, dtype=self.dtype)

    def enqueue(self) -> None:
        """Enqueue all calls on the current stream."""
        for call in range(self.calls):
            self.own.all_reduce_out(self.buffers[call % 2], self.buffers[1 - call % 2])

    def time_us(self, row: policy.Row, replays: int) -> tuple[float, bool]:
        """Return microseconds per call, as this rank's median over the replays, and whether the sums are correct."""
        self.own.set_rows([row])
        self.own.all_reduce_out(self.start, self.buffers[1])  # eager first, because errors are clearer outside a graph
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self.enqueue()
        finally:
            graph.capture_end()
        barrier_row = policy.Row(1 << 40, "oneshot_push", threads=32)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays + 1)]
        self.own.set_rows([barrier_row])
        for before, after in pairs:
            self.buffers[0].copy_(self.start)
            self.own.all_reduce_out(self.barrier, self.barrier)
            before.record(stream)
            graph.replay()
            after.record(stream)
        stream.synchronize()
        right = torch.equal(self.buffers[self.calls % 2], self.expected)
        times = [before.elapsed_time(after) * 1e3 / self.calls for before, after in pairs[1:]]
        return statistics.median(times), right


def calls_for(nbytes: int, world_size: int) -> int:
    """Return the number of calls in a graph: some milliseconds, and W^calls in the dtypes' range."""
    limit = 200 if world_size == 2 else 60
    return max(10, min(limit, (200 << 20) // max(nbytes, 1)))


def format_row(row: policy.Row) -> str:
    """Format a row as the plugin's option accepts it."""
    shape = f"vecs={row.vecs},threads={row.threads},blocks={row.blocks},pipeline_depth={row.pipeline_depth}"
    return f"{row.algorithm}:{shape}"


def join_job(package: str) -> Any:
    """Join the job that torchrun started, on this rank's device, and load a plugin's native code."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    dist.init_process_group("gloo")
    library = kernels.Library(package)
    if dist.get_rank() == 0:
        library.load()  # so that only one rank builds
    dist.barrier()
    return library.load()


def group_context() -> comm.GroupContext:
    """Return the context of a group of all ranks, for the plugin's `connect`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    return comm.GroupContext(
        dist.group.WORLD, rank, world_size, device, tuple(range(world_size)), Control(), 4 << 30, WAIT_TIMEOUT_S
    )


def connect(module: Any) -> session.Session:
    """Connect a session with enough memory for every algorithm."""
    context = group_context()
    major = torch.cuda.get_device_capability(context.device)[0]
    return session.connect(module, major, None, context)


def measure(options: argparse.Namespace, own: session.Session, module: Any) -> list[dict[str, Any]]:
    """Measure every size and shape, and return this rank's lines."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype = getattr(torch, options.dtype)
    if options.sizes == "models":
        sizes = sorted({tokens * hidden * dtype.itemsize for tokens, hidden in MODELS})
    else:
        sizes = [parse_size(size) for size in options.sizes.split(",")]
    given = [
        dataclasses.replace(policy.parse_row(text), up_to_nbytes=1 << 40) for text in options.rows.split(";") if text
    ]
    lines: list[dict[str, Any]] = []
    for nbytes in sizes:
        chain = Chain(own, nbytes // dtype.itemsize, dtype, calls_for(nbytes, world_size))
        for row in given or shapes(nbytes, world_size):
            if options.only and not re.search(options.only, format_row(row)):
                continue
            why = ""
            try:
                took_us, right = chain.time_us(row, options.replays)
            except (RuntimeError, ValueError) as error:
                took_us, right, why = float("inf"), False, str(error)
            if not right:
                sys.stderr.write(f"[rank {rank}] {nbytes} {format_row(row)}: {why or 'wrong sums'}\n")
            lines.append({"nbytes": nbytes, "row": format_row(row), "us": took_us, "right": right})
            # A rank with a time-out has a poisoned session; if there is one, all ranks connect again.
            if any(Control().all_gather(poisoned(own))):
                own.close(False)
                own = chain.own = connect(module)
                own.set_early(not options.late)
    time_eager(own)
    return lines


def poisoned(own: session.Session) -> bool:
    """Return whether a kernel timed out."""
    try:
        own.check()
    except comm.CommTimeoutError:
        return True
    return False


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Time every algorithm and shape of customar_v2.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for tune.json")
    parser.add_argument(
        "--sizes", default=SIZES, help=f"bytes, comma-separated (default {SIZES}); 'models': models' shapes"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--only", default="", help="a regular expression that a shape's text must contain")
    parser.add_argument("--rows", default="", help="only these shapes, semicolon-separated, in the option's format")
    parser.add_argument("--replays", type=int, default=5, help="replays of each graph; the median counts")
    parser.add_argument("--late", action="store_true", help="turn off programmatic dependent launch")
    parser.add_argument("--slot", default="32M", help="the largest slot; larger messages are split (default 32M)")
    parser.add_argument("--top", type=int, default=4, help="number of shapes to print per size")
    options = parser.parse_args()
    started = time.monotonic()
    module = join_job("comm_plugin_customar_v2")
    rank = dist.get_rank()
    layout.SLOT_NBYTES = parse_size(options.slot)
    # Rows of all algorithms, so that the session allocates memory for each.
    policy.rows_for = lambda *_: tuple(policy.Row(64 << 20, name) for name in policy.ALGORITHMS)
    own = connect(module)
    if options.late:
        own.set_early(False)
    if rank == 0:
        print_line(
            f"{torch.cuda.get_device_name()} x{dist.get_world_size()}, torch {torch.__version__}, {options.dtype}, "
            f"buffer {own.memory_nbytes / (1 << 20):.0f} MiB, set up in {time.monotonic() - started:.0f} s"
        )
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream can't capture
    everyone = Control().all_gather(measure(options, own, module))
    if rank == 0:
        report(everyone, options, time.monotonic() - started, dtype=options.dtype, slot=options.slot)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def time_eager(own: session.Session) -> None:
    """Time a call of 8 KiB on the host, out of place and in place; the first rank prints it."""
    own.set_rows([policy.Row(1 << 40, "oneshot_push", threads=128)])
    x = torch.zeros(4096, device="cuda", dtype=torch.bfloat16)

    def each_us(call: Any) -> float:
        rounds = []
        for _ in range(7):
            torch.cuda.synchronize()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(500):
                call()
            torch.cuda.synchronize()
            rounds.append((time.perf_counter() - began) / 500 * 1e6)
        return statistics.median(rounds)

    out = torch.empty_like(x)
    figures = {
        "all_reduce hook, allocated": each_us(lambda: plugin.all_reduce(own, x, None)),
        "all_reduce hook, in place": each_us(lambda: plugin.all_reduce(own, out, out)),
        "torch.empty_like + all_reduce_out": each_us(lambda: own.all_reduce_out(x, torch.empty_like(x))),
        "torch.neg, out=": each_us(lambda: torch.neg(x, out=out)),
        "torch.neg": each_us(lambda: torch.neg(x)),
    }
    if dist.get_rank() == 0:
        print_line("eager, 8 KiB, us per call: " + "; ".join(f"{name} {took:.2f}" for name, took in figures.items()))


def report(everyone: list[list[dict[str, Any]]], options: argparse.Namespace, took_s: float, **settings: str) -> None:
    """Print each size's best shapes by the slowest rank's times, and write all lines and settings to a file."""
    lines = [
        {**ranks[0], "us": max(line["us"] for line in ranks), "right": all(line["right"] for line in ranks)}
        for ranks in zip(*everyone, strict=True)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    data = {
        "schema": 1,
        "command": f"torchrun --nproc-per-node {len(everyone)} {' '.join(sys.argv)}",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": len(everyone),
        **settings,
        "took_s": took_s,
        "lines": lines,
    }
    (options.out / "tune.json").write_text(json.dumps(data, indent=1) + "\n")
    for nbytes in dict.fromkeys(line["nbytes"] for line in lines):
        of_size = sorted((line for line in lines if line["nbytes"] == nbytes), key=lambda line: line["us"])
        best: dict[str, float] = {}
        for line in of_size:
            if line["right"]:
                best.setdefault(line["row"].partition(":")[0], line["us"])
        print_line(f"{nbytes:>9} B  " + "  ".join(f"{name} {us:.2f}" for name, us in best.items()))
        for line in of_size[: options.top]:
            gbps = nbytes / line["us"] / 1e3
            print_line(
                f"{'':13}{line['us']:8.2f} us {gbps:6.1f} GB/s  {line['row']}{'' if line['right'] else '  WRONG'}"
            )
    wrong = sum(not line["right"] for line in lines)
    print_line(f"{len(lines)} lines, {wrong} wrong, {took_s:.0f} s; {options.out / 'tune.json'}")


if __name__ == "__main__":
    sys.exit(main())
