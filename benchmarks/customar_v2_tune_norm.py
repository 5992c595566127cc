#!/usr/bin/env python3
"""Time customar_v2's fused calls in all plausible launch shapes, in CUDA graphs of dependent calls.

    torchrun --nproc-per-node 2 benchmarks/customar_v2_tune_norm.py --out FOLDER [--tokens 1,8,...] [--hidden 4096,...]

Like customar_v2_tune.py, for all-reduce, residual and RMSNorm in one call: each call's results are the next one's
tensor and residual. The first call of each shape is compared with fp64 arithmetic. The results are the same bit for bit
in every launch shape, so the end of a chain is compared with that of the first shape. The plain all-reduce of the same
bytes, with its own table, is timed too: a fused call is hardly faster. The program prints the best shapes by the
slowest rank's median, and writes all to FOLDER/tune_norm.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import comm_plugin_customar_v2 as plugin
import torch
import torch.distributed as dist
from comm_plugin_customar_v2 import norm_policy, policy, session
from customar_v2_tune import Control, connect, join_job, poisoned, print_line

TOKENS = "1,2,3,8,16,33,64,128,256,512,2048"
HIDDEN = "2880,4096,5120,7168"
EPS = 1e-6
_ANY_SIZE = 1 << 40
# The shapes to try: (algorithm, from bytes, to bytes, vectors per thread, cluster sizes, blocks, pipeline depths).
_K, _M = 1 << 10, 1 << 20
GRIDS = (
    ("oneshot_push_norm", 0, 512 * _K, (1, 2, 4), (1, 2, 4, 8), (1056,), (0,)),
    ("oneshot_push_norm", 512 * _K + 1, 8 * _M, (1, 2, 4), (1, 2, 4), (1056,), (0,)),
    ("twoshot_push_norm", 0, 256 * _K, (1, 2), (1,), (1056,), (0,)),
    ("twoshot_push_norm", 256 * _K + 1, 8 * _M, (1, 2), (1, 2, 4, 8), (1056,), (0, 1)),
    ("twoshot_push_norm", 256 * _K + 1, 64 * _M, (1, 2), (1, 2, 4), (132, 264, 528), (0, 1, 2, 9999)),
    ("separate", 0, 64 * _M, (1,), (1,), (1056,), (0,)),
)


def shapes(num_tokens: int, row_nbytes: int, world_size: int, major: int) -> list[norm_policy.NormRow]:
    """Return the launch shapes to try for a message."""
    found: dict[norm_policy.NormRow, None] = {}
    row_vecs = row_nbytes // 16
    for algorithm, low, high, *choices in GRIDS:
        if not low <= num_tokens * row_nbytes <= high:
            continue
        together = world_size if algorithm.startswith("twoshot") else 1
        if num_tokens < together:
            continue
        for vecs, cluster, blocks, depth in itertools.product(*choices):
            threads = -(-row_vecs // (vecs * cluster))
            if (
                (world_size > 2 and vecs != 2 and algorithm != "separate")
                or (cluster > 1 and (major < 9 or threads < 16))
                or threads > 1024
            ):
                continue
            groups = -(-num_tokens // together)
            # Reduce shapes that give the same launch to one.
            grid = min(blocks, groups * cluster)
            rounds = -(-groups * cluster // grid)
            found[norm_policy.NormRow(_ANY_SIZE, algorithm, vecs, cluster, grid, min(depth, rounds))] = None
    return list(found)


def format_row(row: norm_policy.NormRow) -> str:
    """Format a shape."""
    shape = f"vecs={row.vecs},cluster={row.cluster},blocks={row.blocks},pipeline_depth={row.pipeline_depth}"
    return f"{row.algorithm}:{shape}"


class Chain:
    """A graph of dependent calls: a call's norm is the next one's tensor, its sum the next one's residual."""

    def __init__(self, own: session.Session, shape: tuple[int, int], dtype: torch.dtype, calls: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.own, self.calls = own, calls
        world_size, rank = dist.get_world_size(), dist.get_rank()
        base = torch.arange(shape[0] * shape[1], device=device).reshape(shape)
        terms = [(base * (r + 3) % 17 - 8).to(dtype) for r in range(world_size)]
        self.start = (terms[rank], (base * 7 % 23 - 11).to(dtype))
        self.weight = (torch.arange(shape[1], device=device) % 3 + 1).to(dtype) / 4
        self.sum = torch.stack([*terms, self.start[1]]).double().sum(0)
        scale = torch.rsqrt(self.sum.square().mean(-1, keepdim=True) + EPS)
        self.norm = self.sum * scale * self.weight.double()
        self.buffers = [tuple(map(torch.empty_like, self.start)) for _ in range(2)]
        self.barrier = torch.zeros(64, device=device, dtype=dtype)
        self.end: tuple[torch.Tensor, ...] = ()

    def call(self, tensors: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...]) -> None:
        """Make one fused call."""
        self.own.all_reduce_add_rms_norm_out(tensors[0], tensors[1], self.weight, results[0], results[1], EPS, 0.0)

    def plain(self, tensors: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...]) -> None:
        """Make one plain all-reduce of the same bytes."""
        self.own.all_reduce_out(tensors[0], results[0])

    def time_us(self, row: norm_policy.NormRow | None, rows: list[policy.Row], replays: int) -> tuple[float, str]:
        """Return microseconds per call, as this rank's median over the replays, and the error found, or "".

        Times plain calls if `row` is None.
        """
        call, wrong = (self.call, "") if row else (self.plain, "")
        self.own.set_rows(rows)
        if row:
            self.own.set_norm_rows([row])
            self.call(self.start, self.buffers[1])
            wrong = self._check_first_call()
        else:
            self.plain(self.start, self.buffers[1])
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for index in range(self.calls):
                call(self.buffers[index % 2], self.buffers[1 - index % 2])
        finally:
            graph.capture_end()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays + 1)]
        self.own.set_rows([policy.Row(_ANY_SIZE, "oneshot_push", threads=32)])
        for before, after in pairs:
            for buffer, values in zip(self.buffers[0], self.start, strict=True):
                buffer.copy_(values)
            self.own.all_reduce_out(self.barrier, self.barrier)
            before.record(stream)
            graph.replay()
            after.record(stream)
        stream.synchronize()
        # The separate norm rounds once more, so its bits differ.
        if row and row.algorithm != "separate" and not wrong:
            end = tuple(buffer.clone() for buffer in self.buffers[self.calls % 2])
            self.end = self.end or end
            wrong = "" if all(map(torch.equal, self.end, end)) else "the bits differ from the first shape's"
        return statistics.median(before.elapsed_time(after) * 1e3 / self.calls for before, after in pairs[1:]), wrong

    def _check_first_call(self) -> str:
        norm, total = self.buffers[1]
        if not torch.equal(total.double(), self.sum):
            return "wrong sums"
        tolerance = max(4 * torch.finfo(norm.dtype).eps, 1e-5)
        right = torch.allclose(norm.double(), self.norm, rtol=tolerance, atol=tolerance)
        return "" if right else "wrong norms"


def measure(options: argparse.Namespace, own: session.Session, module: Any) -> list[dict[str, Any]]:
    """Measure every message and shape, and return this rank's lines."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype, major = getattr(torch, options.dtype), torch.cuda.get_device_capability()[0]
    rows = list(policy.rows_for(major, world_size))
    lines: list[dict[str, Any]] = []
    for hidden, tokens in itertools.product(numbers(options.hidden), numbers(options.tokens)):
        nbytes = tokens * hidden * dtype.itemsize
        if nbytes > norm_policy.rows_for(major, world_size)[-1].up_to_nbytes:
            continue
        chain = Chain(own, (tokens, hidden), dtype, max(10, min(200, (200 << 20) // nbytes)))
        for row in [None, *shapes(tokens, hidden * dtype.itemsize, world_size, major)]:
            text = format_row(row) if row else "plain"
            if options.only and row and not re.search(options.only, text):
                continue
            try:
                took_us, wrong = chain.time_us(row, rows, options.replays)
            except (RuntimeError, ValueError) as error:
                took_us, wrong = float("inf"), str(error)
            if wrong:
                sys.stderr.write(f"[rank {rank}] {tokens} x {hidden} {text}: {wrong}\n")
            lines.append({"tokens": tokens, "hidden": hidden, "row": text, "us": took_us, "wrong": wrong})
            # A rank with a time-out has a poisoned session; if there is one, all ranks connect again.
            if any(Control().all_gather(poisoned(own))):
                own.close(False)
                own = chain.own = connect(module)
                own.set_early(not options.late)
    time_eager(own, rows)
    return lines


def numbers(text: str) -> list[int]:
    """Parse numbers such as "1,2,3"."""
    return [int(number) for number in text.split(",")]


def time_eager(own: session.Session, rows: list[policy.Row]) -> None:
    """Time a call of 1 x 4096 on the host, with new outputs and in place; the first rank prints it."""
    own.set_rows(rows)
    own.set_norm_rows([norm_policy.NormRow(_ANY_SIZE, "oneshot_push_norm", vecs=2)])
    x = torch.zeros(1, 4096, device="cuda", dtype=torch.bfloat16)
    weight, residual, spare = torch.zeros_like(x[0]), torch.zeros_like(x), torch.zeros_like(x)

    def bare() -> None:
        y, total = torch.empty_like(x), torch.empty_like(residual)
        own.all_reduce_add_rms_norm_out(x, residual, weight, y, total, EPS, 0.0)

    calls = {
        "hook, allocated": lambda: plugin.all_reduce_add_rms_norm(own, x, residual, weight, EPS, 0.0, None, None),
        "hook, in place": lambda: plugin.all_reduce_add_rms_norm(own, x, residual, weight, EPS, 0.0, x, residual),
        "two torch.empty_like + all_reduce_add_rms_norm_out": bare,
        "two torch.empty_like + torch.neg, out=": lambda: (
            torch.empty_like(x),
            torch.neg(x, out=torch.empty_like(x)),
        ),
        "torch.neg, out=": lambda: torch.neg(x, out=spare),
    }
    figures = {}
    for name, call in calls.items():
        rounds = []
        for _ in range(7):
            torch.cuda.synchronize()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(500):
                call()
            torch.cuda.synchronize()
            rounds.append((time.perf_counter() - began) / 500 * 1e6)
        figures[name] = statistics.median(rounds)
    if dist.get_rank() == 0:
        print_line("eager, 1 x 4096, us per call: " + "; ".join(f"{name} {took:.2f}" for name, took in figures.items()))


def report(everyone: list[list[dict[str, Any]]], options: argparse.Namespace, took_s: float) -> None:
    """Print each message's best shapes by the slowest rank's times, and write all lines to a file."""
    lines = [
        {
            **ranks[0],
            "us": max(line["us"] for line in ranks),
            "wrong": next(filter(None, (r["wrong"] for r in ranks)), ""),
        }
        for ranks in zip(*everyone, strict=True)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    data = {
        "schema": 1,
        "command": f"torchrun --nproc-per-node {len(everyone)} {' '.join(sys.argv)}",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": len(everyone),
        "dtype": options.dtype,
        "took_s": took_s,
        "lines": lines,
    }
    (options.out / "tune_norm.json").write_text(json.dumps(data, indent=1) + "\n")
    for message, group in itertools.groupby(lines, key=lambda line: (line["tokens"], line["hidden"])):
        plain, *shaped = group
        print_line(f"{message[0]:>5} x {message[1]:<6} plain {plain['us']:.2f}{' WRONG' if plain['wrong'] else ''}")
        for line in sorted(shaped, key=lambda line: line["us"])[: options.top]:
            print_line(f"{'':15}{line['us']:8.2f} us  {line['row']}  {line['wrong'] and 'WRONG'}".rstrip())
    wrong = sum(bool(line["wrong"]) for line in lines)
    print_line(f"{len(lines)} lines, {wrong} wrong, {took_s:.0f} s; {options.out / 'tune_norm.json'}")


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Time every fused algorithm and shape of customar_v2.")
    parser.add_argument("--out", type=Path, required=True, help="the folder for tune_norm.json")
    parser.add_argument("--tokens", default=TOKENS, help=f"comma-separated (default {TOKENS})")
    parser.add_argument("--hidden", default=HIDDEN, help=f"hidden sizes, comma-separated (default {HIDDEN})")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", default="", help="a regular expression that a shape's text must contain")
    parser.add_argument("--replays", type=int, default=5, help="replays of each graph; the median counts")
    parser.add_argument("--late", action="store_true", help="turn off programmatic dependent launch")
    parser.add_argument("--top", type=int, default=4, help="number of shapes to print per message")
    options = parser.parse_args()
    started = time.monotonic()
    module = join_job("comm_plugin_customar_v2")
    own = connect(module)
    own.set_early(not options.late)
    if dist.get_rank() == 0:
        print_line(
            f"{torch.cuda.get_device_name()} x{dist.get_world_size()}, torch {torch.__version__}, {options.dtype}, "
            f"set up in {time.monotonic() - started:.0f} s"
        )
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream can't capture
    everyone = Control().all_gather(measure(options, own, module))
    if dist.get_rank() == 0:
        report(everyone, options, time.monotonic() - started)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
