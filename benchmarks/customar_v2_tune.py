#!/usr/bin/env python3
"""Times every algorithm of customar_v2 in every shape of launch that makes sense, in CUDA graphs of dependent calls.

    torchrun --nproc-per-node 2 benchmarks/customar_v2_tune.py --out FOLDER [--sizes 1K,8K,...] [--only REGEX]

For each size and shape a graph of calls is captured, each reading what the one before wrote, and replayed with an event
on either side; before each replay the ranks meet in one call, so that they start together. The sums at the chain's end
are checked. Printed are each size's best shapes, by the slowest rank's median; FOLDER/tune.json has everything.
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
#: Tokens and hidden sizes of models, bf16: what isn't a power of two.
MODELS = [(tokens, hidden) for tokens in (1, 3, 5, 7, 33, 129, 500) for hidden in (2880, 4096, 5120, 7168)]
WAIT_TIMEOUT_S = 5.0


def say(text: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Control:
    """`comm.ControlChannel` over a Gloo group: enough for `connect`."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Return once every rank is here."""
        dist.barrier()

    def agree(self, ok: bool, reason: str = "") -> comm.Agreement:
        """Vote."""
        votes = self.all_gather((ok, reason))
        return comm.Agreement(
            all(vote for vote, _ in votes), {r: why for r, (vote, why) in enumerate(votes) if not vote}
        )


def parse_size(text: str) -> int:
    """Bytes of "4K", "16M" or a plain number."""
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


# (algorithm, from bytes, to bytes, vectors a thread, threads, blocks, pipeline depths): what is worth a look where.
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


def most_threads(world_size: int, vecs: int) -> int:
    """Of a block; `max_threads` in csrc/params.cuh."""
    if world_size == 2:
        return 512 if vecs >= 4 else 1024
    return 256 if (world_size - 1) * vecs >= 5 else 512


def shapes(nbytes: int, world_size: int) -> list[policy.Row]:
    """The shapes of launch that are worth a look at a size; those that come out the same once."""
    found: dict[tuple[Any, ...], policy.Row] = {}
    for algorithm, low, high, *choices in GRIDS:
        if not low <= nbytes <= high:
            continue
        work = -(-nbytes // 16) // (world_size if algorithm.startswith("twoshot") else 1)
        for vecs, threads, blocks, depth in itertools.product(*choices):
            a_block = threads * vecs
            grid = max(1, min(blocks, -(-work // a_block)))
            rounds = -(-work // (a_block * grid))
            if vecs > (4 if world_size == 2 else 1) or threads > most_threads(world_size, vecs):
                continue
            row = policy.Row(1 << 40, algorithm, vecs, threads, blocks, min(depth, rounds))
            found.setdefault((algorithm, vecs, threads, grid, row.pipeline_depth), row)
    return list(found.values())


@dataclasses.dataclass
class Chain:
    """A graph of dependent calls over two buffers, and what its sums must be."""

    own: session.Session
    numel: int
    dtype: torch.dtype
    calls: int

    def __post_init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        world_size, rank = dist.get_world_size(), dist.get_rank()
        # Small integers times a power of two that W^calls can't take out of bfloat16's or float32's range.
        scale = 2.0**-110 if world_size == 2 else 2.0**-120
        base = torch.arange(self.numel, device=device, dtype=torch.float32) % 13
        terms = [((base + r) * scale).to(self.dtype) for r in range(world_size)]
        self.start = terms[rank]
        # Every call after the first sums what is the same on all ranks; each is rounded once.
        for _ in range(self.calls):
            total = sum((term.float() for term in terms[1:]), terms[0].float())
            terms = [total.to(self.dtype)] * world_size
        self.expected = terms[0]
        self.buffers = [torch.empty_like(self.start), torch.empty_like(self.start)]
        self.meeting = torch.zeros(64, device=device, dtype=self.dtype)

    def enqueue(self) -> None:
        """All calls on the current stream."""
        for call in range(self.calls):
            self.own.all_reduce_out(self.buffers[call % 2], self.buffers[1 - call % 2])

    def time_us(self, row: policy.Row, replays: int) -> tuple[float, bool]:
        """Microseconds a call, this rank's median over the replays, and whether the sums are right."""
        self.own.set_rows([row])
        self.own.all_reduce_out(self.start, self.buffers[1])  # eager once: an error here needs no graph to be seen
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self.enqueue()
        finally:
            graph.capture_end()
        meet = policy.Row(1 << 40, "oneshot_push", threads=32)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays + 1)]
        self.own.set_rows([meet])
        for before, after in pairs:
            self.buffers[0].copy_(self.start)
            self.own.all_reduce_out(self.meeting, self.meeting)
            before.record(stream)
            graph.replay()
            after.record(stream)
        stream.synchronize()
        right = torch.equal(self.buffers[self.calls % 2], self.expected)
        times = [before.elapsed_time(after) * 1e3 / self.calls for before, after in pairs[1:]]
        return statistics.median(times), right


def calls_of(nbytes: int, world_size: int) -> int:
    """Calls a graph: some milliseconds, within the range of W^calls."""
    most = 200 if world_size == 2 else 60
    return max(10, min(most, (200 << 20) // max(nbytes, 1)))


def text_of(row: policy.Row) -> str:
    """A row as the option takes it."""
    shape = f"vecs={row.vecs},threads={row.threads},blocks={row.blocks},pipeline_depth={row.pipeline_depth}"
    return f"{row.algorithm}:{shape}"


def joined(package: str) -> Any:
    """Join the job that torchrun started, on this rank's device; a plugin's native code."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    dist.init_process_group("gloo")
    library = kernels.Library(package)
    if dist.get_rank() == 0:
        library.load()  # one rank builds where nothing is built yet
    dist.barrier()
    return library.load()


def group_context() -> comm.GroupContext:
    """Of all ranks: what `connect` takes."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    return comm.GroupContext(
        dist.group.WORLD, rank, world_size, device, tuple(range(world_size)), Control(), 4 << 30, WAIT_TIMEOUT_S
    )


def connected(module: Any) -> session.Session:
    """A session that has room for every algorithm."""
    context = group_context()
    major = torch.cuda.get_device_capability(context.device)[0]
    return session.connect(module, major, None, context)


def measure(options: argparse.Namespace, own: session.Session, module: Any) -> list[dict[str, Any]]:
    """This rank's line for every size and shape."""
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
        chain = Chain(own, nbytes // dtype.itemsize, dtype, calls_of(nbytes, world_size))
        for row in given or shapes(nbytes, world_size):
            if options.only and not re.search(options.only, text_of(row)):
                continue
            why = ""
            try:
                took_us, right = chain.time_us(row, options.replays)
            except (RuntimeError, ValueError) as error:
                took_us, right, why = float("inf"), False, str(error)
            if not right:
                sys.stderr.write(f"[rank {rank}] {nbytes} {text_of(row)}: {why or 'wrong sums'}\n")
            lines.append({"nbytes": nbytes, "row": text_of(row), "us": took_us, "right": right})
            # A rank that gave up has poisoned its session; so that all go on alike, they tell each other.
            if any(Control().all_gather(poisoned(own))):
                own.close(False)
                own = chain.own = connected(module)
                own.set_early(not options.late)
    eager(own)
    return lines


def poisoned(own: session.Session) -> bool:
    """Whether a kernel gave up."""
    try:
        own.check()
    except comm.CommTimeoutError:
        return True
    return False


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Time every algorithm and shape of customar_v2.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for tune.json")
    parser.add_argument("--sizes", default=SIZES, help=f"bytes, comma-separated (default {SIZES}); 'models': odd ones")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--only", default="", help="a regular expression that a shape's text must contain")
    parser.add_argument("--rows", default="", help="exactly these shapes, as the option takes them, semicolons between")
    parser.add_argument("--replays", type=int, default=5, help="of each graph; the median counts")
    parser.add_argument("--late", action="store_true", help="no kernel starts before the one before has ended")
    parser.add_argument("--slot", default="32M", help="the largest slot; larger messages are cut (default 32M)")
    parser.add_argument("--top", type=int, default=4, help="shapes printed a size")
    options = parser.parse_args()
    started = time.monotonic()
    module = joined("comm_plugin_customar_v2")
    rank = dist.get_rank()
    layout.SLOT_NBYTES = parse_size(options.slot)
    # Room for every algorithm at once.
    policy.rows_for = lambda *_: tuple(policy.Row(64 << 20, name) for name in policy.ALGORITHMS)
    own = connected(module)
    if options.late:
        own.set_early(False)
    if rank == 0:
        say(
            f"{torch.cuda.get_device_name()} x{dist.get_world_size()}, torch {torch.__version__}, {options.dtype}, "
            f"buffer {own.memory_nbytes / (1 << 20):.0f} MiB, set up in {time.monotonic() - started:.0f} s"
        )
    torch.cuda.set_stream(torch.cuda.Stream())  # what captures can't be the default stream
    everyone = Control().all_gather(measure(options, own, module))
    if rank == 0:
        report(everyone, options, time.monotonic() - started, dtype=options.dtype, slot=options.slot)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def eager(own: session.Session) -> None:
    """What a call of 8 KiB costs the host, out of place and in place; printed by the first rank."""
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
        say("eager, 8 KiB, us a call: " + "; ".join(f"{name} {took:.2f}" for name, took in figures.items()))


def report(everyone: list[list[dict[str, Any]]], options: argparse.Namespace, took_s: float, **settings: str) -> None:
    """The slowest rank's times: the best shapes of each size on stdout, all in a file, with the settings."""
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
        say(f"{nbytes:>9} B  " + "  ".join(f"{name} {us:.2f}" for name, us in best.items()))
        for line in of_size[: options.top]:
            gbps = nbytes / line["us"] / 1e3
            say(f"{'':13}{line['us']:8.2f} us {gbps:6.1f} GB/s  {line['row']}{'' if line['right'] else '  WRONG'}")
    wrong = sum(not line["right"] for line in lines)
    say(f"{len(lines)} lines, {wrong} wrong, {took_s:.0f} s; {options.out / 'tune.json'}")


if __name__ == "__main__":
    sys.exit(main())
