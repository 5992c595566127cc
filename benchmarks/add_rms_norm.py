#!/usr/bin/env python3
"""Time the residual's add and RMSNorm after an all-reduce on one GPU: torch's, Triton's and FlashInfer's kernels.

    python benchmarks/add_rms_norm.py [--json FILE] [--tokens 1,16,512] [--hidden 4096] [--warps 4,8,16,32]

Each contender is recorded in a CUDA graph of in-place calls, and the graphs are replayed in turn. FlashInfer's
`fused_add_rmsnorm` supports only in-place calls in half precision without a weight offset. Results are compared with
fp64.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from comm_bench import stats
from comm_core._handle import fallback, norm

SCHEMA = 1
EPS = 1e-6
DTYPES = ("bfloat16", "float16")
TOKENS = (1, 2, 3, 8, 16, 33, 64, 128, 256, 512, 2048)
HIDDEN = (2880, 4096, 5120, 7168)
CALLS = 50
REPEATS = 25

# (tensor, residual, weight): the norm overwrites the first, the sum the second.
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


@dataclasses.dataclass(frozen=True)
class Line:
    """One contender's times of one case.

    Attributes:
        name: the contender's name.
        dtype: the tensors' dtype.
        num_tokens: the number of rows.
        hidden_size: the number of elements in a row.
        us: microseconds per call in a graph: the median, the tenth and the ninetieth percentile.
        times_as_fast: torch's time over this one's, pair by pair of replays: the median and its confidence interval.
        worst: the norm's largest relative error, in units of the dtype's epsilon.
    """

    name: str
    dtype: str
    num_tokens: int
    hidden_size: int
    us: tuple[float, float, float]
    times_as_fast: tuple[float, float, float]
    worst: float


def print_line(text: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def by_torch(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> object:
    """Call the kernels that core uses without Triton."""
    return fallback._torch_add_rms_norm(x, r, w, EPS, 0.0, x, r)  # noqa: SLF001 - the public function would choose Triton


def by_triton(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> object:
    """Call the kernel that `comm_core.fallback.add_rms_norm` uses for CUDA tensors."""
    return norm.add_rms_norm(x, r, w, EPS, 0.0, x, r)


def by_triton_with(warps: int, dtype: torch.dtype, hidden_size: int) -> Call:
    """Return a call of the same kernel with another number of warps per program."""
    launch = importlib.import_module("comm_core._handle.norm_triton").compile_kernel(
        dtype, hidden_size, dtype, dtype, warps
    )
    return lambda x, r, w: launch(len(x), x, r, w, x, r, EPS, 0.0)


def contenders(dtype: torch.dtype, hidden_size: int, warps: list[int]) -> dict[str, Call]:
    """Return the available contenders by name."""
    found: dict[str, Call] = {"torch": by_torch}
    missing = norm.prepare(torch.device("cuda"), dtype, hidden_size)
    if missing:
        print_line(missing)
    else:
        found["triton"] = by_triton
        found |= {f"triton_{count}_warps": by_triton_with(count, dtype, hidden_size) for count in warps}
    try:
        theirs: Any = importlib.import_module("flashinfer.norm")
    except ImportError as error:
        print_line(f"no FlashInfer: {error}")
    else:
        found["flashinfer"] = lambda x, r, w: theirs.fused_add_rmsnorm(x, r, w, EPS)
    return found


def inputs(dtype: torch.dtype, num_tokens: int, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normally distributed numbers, the same in every call."""
    generator = torch.Generator(device="cuda").manual_seed(num_tokens)
    shapes = ((num_tokens, hidden_size), (num_tokens, hidden_size), (hidden_size,))
    x, r, w = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes)
    return x, r, w


def error_of(call: Call, dtype: torch.dtype, num_tokens: int, hidden_size: int) -> float:
    """Return the norm's largest relative error, in units of the dtype's epsilon."""
    x, r, w = inputs(dtype, num_tokens, hidden_size)
    sums = x.double() + r.double()
    exact = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + EPS) * w.double()
    call(x, r, w)
    return float(((x.double() - exact) / exact.abs().clamp_min(1e-3)).abs().max()) / torch.finfo(dtype).eps


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A graph, and the tensors that it reads and writes, kept with it."""

    graph: torch.cuda.CUDAGraph
    tensors: tuple[torch.Tensor, ...]


def record(call: Call, dtype: torch.dtype, num_tokens: int, hidden_size: int) -> Recorded:
    """Record a graph of `CALLS` calls, each on the previous call's results."""
    x, r, w = inputs(dtype, num_tokens, hidden_size)
    call(x, r, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call(x, r, w)
    graph.replay()
    return Recorded(graph, (x, r, w))


def time_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Time one replay, in microseconds per call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / CALLS


def measure(dtype_name: str, num_tokens: int, hidden_size: int, warps: list[int]) -> Iterator[Line]:
    """Measure one case, and yield a line for each contender."""
    dtype = getattr(torch, dtype_name)
    calls = contenders(dtype, hidden_size, warps)
    worst = {name: error_of(call, dtype, num_tokens, hidden_size) for name, call in calls.items()}
    graphs = {name: record(call, dtype, num_tokens, hidden_size) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            samples[name].append(time_replay(graph.graph))
    for name, times in samples.items():
        spread, ratio = stats.spread(times), stats.ratio(times, samples["torch"])
        yield Line(
            name,
            dtype_name,
            num_tokens,
            hidden_size,
            (spread.median, spread.p10, spread.p90),
            (ratio.median, ratio.low, ratio.high),
            worst[name],
        )


def main() -> None:
    """Measure every case, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = {"type": lambda text: [int(part) for part in text.split(",")], "metavar": "N,..."}
    parser.add_argument("--tokens", default=list(TOKENS), help="rows", **numbers)
    parser.add_argument("--hidden", default=list(HIDDEN), help="elements in a row", **numbers)
    parser.add_argument("--warps", default=[], help="also the kernel with these numbers of warps", **numbers)
    parser.add_argument("--json", type=Path, help="write the lines, the machine and the versions here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this program needs one")
    lines: list[Line] = []
    print_line(f"{'dtype':9}{'tokens':>7}{'hidden':>7}  {'':16}{'us':>8}{'times as fast as torch':>26}{'error':>8}")
    for dtype in DTYPES:
        for hidden_size in args.hidden:
            for num_tokens in args.tokens:
                for line in measure(dtype, num_tokens, hidden_size, args.warps):
                    lines.append(line)
                    low, high = line.times_as_fast[1:]
                    ratio = f"{line.times_as_fast[0]:.2f} ({low:.2f} to {high:.2f})"
                    case = f"{dtype:9}{num_tokens:7}{hidden_size:7}  {line.name:16}"
                    print_line(f"{case}{line.us[0]:8.2f}{ratio:>26}{line.worst:8.2f}")
    if args.json:
        machine = {
            "command": f"python {' '.join(sys.argv)}",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }
        document = {"schema": SCHEMA, **machine, "lines": [dataclasses.asdict(line) for line in lines]}
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
