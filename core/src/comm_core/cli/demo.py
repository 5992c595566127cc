"""`comm-core demo`: real tensors through a negotiated backend, checked and timed beside torch.distributed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comm_core.cli._terminal import show
from comm_core.command import contention, joined, launch, size, table, under_torchrun

if TYPE_CHECKING:
    import torch

    from comm_core._handle.backend import Backend

__all__ = ["add_parser", "run"]

#: The version of the JSON.
SCHEMA = 1
_NBYTES = (1 << 10, 8 << 10, 64 << 10, 1 << 20, 16 << 20)
_DTYPES = ("bfloat16", "float32", "int32")
# Each block of 3 to 200 calls, about this many bytes in total, is timed as one; and the number of timed blocks.
_BLOCK_NBYTES = 8 << 20
_BLOCKS = 7


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="all-reduce real tensors through this host's backends",
        description="Joins the job that torchrun started, else starts processes on this host; prints the decision, "
        "sums tensors of several sizes and dtypes, checks every element and times each beside torch.distributed.",
    )
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="processes to start (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 1 if an element was wrong or a process failed, else 0."""
    if not under_torchrun():
        if args.nproc < 2:
            args.fail(f"--nproc {args.nproc}: a single rank has nothing to reduce; start at least two")
        _tell(f"starting {args.nproc} processes; native code that isn't compiled yet is compiled now, once")
        return launch(args.nproc, args.arguments)
    with joined() as rank:
        if rank == 0 and (reason := contention()):
            sys.stderr.write(f"The times below aren't this machine's best: {reason}.\n")
        return _demo(rank, as_json=args.json)


def _tell(progress: str) -> None:
    """Show the progress, if a terminal is there for it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{progress} ...\n")


def _demo(rank: int, *, as_json: bool) -> int:
    import torch
    import torch.distributed as dist

    import comm_core as comm

    backend = comm.get_backend()
    if rank == 0 and not as_json:
        show(backend.explain(), end="\n\n")
    group = dist.group.WORLD
    world_size = dist.get_world_size()
    rows = []
    for dtype, nbytes in itertools.product(_DTYPES, _NBYTES):
        tensor = _test_tensor(rank, world_size, nbytes, dtype, backend.device)
        total = sum(_test_tensor(r, world_size, nbytes, dtype, backend.device).double() for r in range(world_size))
        wrong = (backend.all_reduce(tensor).double() != total).sum()
        dist.all_reduce(wrong)
        calls = [functools.partial(backend.all_reduce, tensor), functools.partial(_reference, tensor, group)]
        slowest = torch.tensor(_time(calls, nbytes, backend), dtype=torch.float64, device=backend.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        ours, theirs = slowest.tolist()
        name = backend.decision.route("all_reduce", "eager", backend.device.type, dtype).backend_for(nbytes)
        rows.append(Row(nbytes, dtype, name, ours, theirs, int(wrong)))
    limits = backend.limits()
    if rank == 0:
        if as_json:
            record = {"decision": backend.decision.to_json(), "ranks": world_size, "limits_us": limits}
            print(json.dumps({"schema": SCHEMA, **record, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        else:
            _print_rows(rows, world_size, limits)
    return 1 if any(row.wrong for row in rows) else 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One size and dtype.

    Attributes:
        nbytes: the message's size in bytes.
        dtype: its dtype.
        backend: who served it.
        time_us: the time of a call, in microseconds.
        torch_us: that of `torch.distributed`, in microseconds.
        wrong: the number of wrong elements, on all ranks together.
    """

    nbytes: int
    dtype: str
    backend: str
    time_us: float
    torch_us: float
    wrong: int


def _print_rows(rows: Sequence[Row], world_size: int, limits: Mapping[str, Mapping[str, float]]) -> None:
    lines = [("size", "dtype", "served by", "us", "torch.distributed us", "times as fast", "#wrong")]
    for row in rows:
        figures = (f"{row.time_us:.1f}", f"{row.torch_us:.1f}", f"{row.torch_us / row.time_us:.2f}", str(row.wrong))
        lines.append((size(row.nbytes), row.dtype, row.backend, *figures))
    print(table(lines))
    print(f"\n{world_size} ranks, out of place, eager, the slowest rank's median of {_BLOCKS} blocks")
    for name, bounds in limits.items():
        for what, latency_us in bounds.items():
            print(f"{name}, lower bound here: {what}, {latency_us:.2f} us")


def _test_tensor(rank: int, world_size: int, nbytes: int, dtype: str, device: torch.device) -> torch.Tensor:
    """Make small integers that differ by rank and element; their sum is exact in every dtype, up to 256 ranks."""
    import torch

    kind = getattr(torch, dtype)
    # bfloat16 is exact for integers up to 256, so every partial sum over ranks is exact.
    largest = max(256 // world_size, 1)
    numbers = (torch.arange(nbytes // kind.itemsize, device=device) * 7 + rank * 5) % 31
    return (numbers % (largest + 1)).to(kind)


def _reference(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    import torch.distributed as dist

    out = tensor.clone()
    dist.all_reduce(out, group=group)
    return out


def _time(calls: Sequence[Callable[[], Any]], nbytes: int, backend: Backend) -> list[float]:
    """Return the median time of each call over the blocks, in microseconds; the calls alternate."""
    import torch
    import torch.distributed as dist

    def synchronize() -> None:
        if backend.device.type == "cuda":
            torch.cuda.synchronize(backend.device)

    repeats = max(3, min(200, _BLOCK_NBYTES // nbytes))
    taken: list[list[float]] = [[] for _ in calls]
    for block in range(_BLOCKS + 1):
        for call, times in zip(calls, taken, strict=True):
            dist.barrier()
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronize()
            if block:  # the first block warms up
                times.append((time.perf_counter() - start) / repeats * 1e6)
    return [statistics.median(times) for times in taken]
