#!/usr/bin/env python3
"""Time one tensor-parallel decode step of Llama-3-shaped layers with torch.distributed and comm-core, in CUDA graphs.

    torchrun --nproc-per-node 2 benchmarks/decode_step.py [--shape 8B,70B] [--fp8] [--json FILE] [--plot FILE]

A layer has four linear layers, attention over 512 cached tokens, SiLU, and twice an all-reduce, residual and RMSNorm.
There is no rotary embedding, vocabulary or sampling. The ways differ only in the operations after a row-parallel layer:

    torch.distributed   dist.all_reduce in place, torch's add, torch's rms_norm
    plain               backend.all_reduce, torch's add, torch's rms_norm
    fused               backend.all_reduce_add_rms_norm
    none                torch's add, torch's rms_norm: a wrong result, but a lower bound for the time

With --fp8 the linear layers multiply FP8 by FP8, with a scale for each token and for each row of the weight. Core's
kernel quantises what the norms, attention and SiLU return; after a row-parallel layer:

    torch.distributed   as above, then core's quantisation
    norm then quant     backend.all_reduce_add_rms_norm, then core's quantisation
    fused quant         backend.all_reduce_add_rms_norm_quant
    none                as above, then core's quantisation

Each way has one CUDA graph. In each round all graphs are replayed in turn; a round's time is the slowest rank's. With
too few GPUs, the ranks use CPUs and Gloo without graphs, which only shows that the program runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core import fallback
from torch.nn import functional
from torchrun_job import describe, join, leave, max_over_ranks, time_us

CACHE_TOKENS = 512
EPS = 1e-5
DTYPE = torch.bfloat16
QUANT = "fp8_per_token"
REFERENCE, SEPARATE, FUSED = "torch.distributed", "norm then quant", "fused quant"
#: The operations of the ways that don't end in torch's norm.
OPS = {"plain": "all_reduce", "fused": "all_reduce_add_rms_norm", SEPARATE: "all_reduce_add_rms_norm"}
OPS |= {FUSED: "all_reduce_add_rms_norm_quant"}
#: An element is wrong if it differs from fp32 arithmetic by more than this, in units of the elements' root mean square.
#: After 80 layers, bfloat16's rounding gives an error of 0.02 on average and at most 0.25; a missing sum gives 1.
TOLERANCE = 0.5
#: The same with --fp8, against the same quantised weights and activations that aren't quantised. After 80 layers of 512
#: elements, the activations' rounding gives an error of 0.06 on average and at most 0.24; a missing sum gives 1.1.
FP8_TOLERANCE = 1.0

Pair = tuple[torch.Tensor, torch.Tensor]
#: A linear layer's input: a tensor, or with --fp8 the values and their scales.
Input = tuple[torch.Tensor, ...]
Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[Input, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's layers. Layer i uses weights and cache i modulo `distinct`, so large models fit, but not in L2."""

    layers: int
    distinct: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = {
    "8B": Shape(32, 32, 4096, 14336, 32, 8),
    "70B": Shape(80, 16, 8192, 28672, 64, 8),
    "tiny": Shape(3, 2, 64, 128, 4, 2, 16),
}


class Model:
    """This rank's random weights, caches and input; the norms' weights and the input are equal on all ranks."""

    def __init__(self, shape: Shape, max_batch: int, device: torch.device, *, fp8: bool) -> None:
        ranks = dist.get_world_size()
        if shape.kv_heads % ranks:
            raise ValueError(f"{ranks} ranks can't share {shape.kv_heads} key heads evenly")
        own, self.shared = (torch.Generator(device).manual_seed(seed) for seed in (1 + dist.get_rank(), 0))

        def normal(*size: int, scale: float, generator: torch.Generator = own) -> torch.Tensor:
            return torch.randn(size, device=device, dtype=DTYPE, generator=generator).mul_(scale)

        def weight(*size: int, scale: float) -> Input:
            return self.packed(normal(*size, scale=scale))

        self.shape, self.fp8 = shape, fp8
        self.sizes = [count // ranks * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
        part = shape.intermediate // ranks
        self.weights = [
            {
                "qkv": weight(sum(self.sizes), shape.hidden, scale=shape.hidden**-0.5),
                "o": weight(shape.hidden, self.sizes[0], scale=(self.sizes[0] * ranks) ** -0.5),
                "gate_up": weight(2 * part, shape.hidden, scale=shape.hidden**-0.5),
                "down": weight(shape.hidden, part, scale=shape.intermediate**-0.5),
            }
            for _ in range(shape.distinct)
        ]
        cache = (max_batch, shape.kv_heads // ranks, CACHE_TOKENS, shape.head_dim)
        # Attention averages over the cache; these large values make its output as large as the MLP's.
        self.caches = [(normal(*cache, scale=1.0), normal(*cache, scale=CACHE_TOKENS**0.5)) for _ in self.weights]
        self.norms = [1 + normal(shape.hidden, scale=0.1, generator=self.shared) for _ in range(2 * shape.layers + 1)]
        self.input = normal(max_batch, shape.hidden, scale=1.0, generator=self.shared)
        self.layer_nbytes = sum(part.nbytes for parts in self.weights[0].values() for part in parts)
        l2_nbytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        if (shape.distinct - 1) * self.layer_nbytes < 2 * l2_nbytes:
            raise ValueError("the L2 cache might hold the weights: raise --distinct")

    def packed(self, x: torch.Tensor) -> Input:
        """Return a linear layer's input or weight: the tensor, or with --fp8 its quantised rows if it is 16 bit."""
        if not self.fp8 or x.dtype != DTYPE:
            return (x,)
        return fallback.quantize(x, QUANT, torch.empty((len(x), 1), dtype=torch.float32, device=x.device))

    def step(self, batch: int, combine: Combine, dtype: torch.dtype = DTYPE) -> Input:
        """Decode one token for each of `batch` sequences; return the last linear input and the residual."""
        norms = iter([norm.to(dtype) for norm in self.norms])
        residual = self.input[:batch].to(dtype)
        hidden = self.packed(functional.rms_norm(residual, residual.shape[1:], next(norms), EPS))
        for layer in range(self.shape.layers):
            weights = self.weights[layer % self.shape.distinct]
            keys, values = (cache[:batch] for cache in self.caches[layer % self.shape.distinct])
            parts = linear(hidden, weights["qkv"], dtype).split(self.sizes, dim=-1)
            q, keys[:, :, -1], values[:, :, -1] = (part.unflatten(-1, (-1, self.shape.head_dim)) for part in parts)
            # With one new token per sequence, the query heads that share a key head act as that head's queries.
            q = q.unflatten(1, (keys.shape[1], -1))
            mixed = functional.scaled_dot_product_attention(q, keys.to(dtype), values.to(dtype))
            out = linear(self.packed(mixed.flatten(1)), weights["o"], dtype)
            hidden, residual = combine(out, residual, next(norms))
            gate, up = linear(hidden, weights["gate_up"], dtype).chunk(2, dim=-1)
            out = linear(self.packed(functional.silu(gate) * up), weights["down"], dtype)
            hidden, residual = combine(out, residual, next(norms))
        return *hidden, residual


def values_of(packed: Input) -> torch.Tensor:
    """Return the numbers that a linear layer's input or weight stands for, quantised ones in fp32."""
    return packed[0] if len(packed) == 1 else packed[0].float() * packed[1]


def linear(x: Input, weight: Input, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's output; torch multiplies FP8 on GPUs only."""
    if len(x) == 2 and dtype == DTYPE and x[0].is_cuda:
        return torch._scaled_mm(  # noqa: SLF001 - the public function came with torch 2.10
            x[0], weight[0].t(), x[1], weight[1].t(), out_dtype=DTYPE, use_fast_accum=True
        )
    return functional.linear(values_of(x).to(dtype), values_of(weight).to(dtype))


def combines(backend: comm.Backend, model: Model) -> dict[str, Combine]:
    """Return each way's function for the all-reduce, residual and norm after a row-parallel layer."""

    def norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Input, torch.Tensor]:
        residual = residual + x
        return model.packed(functional.rms_norm(residual, weight.shape, weight, EPS)), residual

    def fused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Input, torch.Tensor]:
        y, residual = backend.all_reduce_add_rms_norm(x, residual, weight, EPS)
        return model.packed(y), residual

    def fused_quant(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Input, torch.Tensor]:
        q, scales, residual, _ = backend.all_reduce_add_rms_norm_quant(x, residual, weight, EPS, quant=QUANT)
        return (q, scales), residual

    def in_place(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Input, torch.Tensor]:
        return norm(backend.all_reduce(x), residual, weight)

    ours: dict[str, Combine] = {SEPARATE: fused, FUSED: fused_quant} if model.fp8 else {"plain": plain, "fused": fused}
    return {REFERENCE: lambda x, residual, weight: norm(in_place(x), residual, weight), **ours, "none": norm}


def record(step: Callable[[], Input]) -> tuple[Callable[[], object], Input]:
    """Return the replay of a step's CUDA graph and its outputs; without GPUs, the step itself. Collective."""
    for _ in range(3):  # NCCL, cuBLAS and attention initialise in eager calls
        outputs = step()
    if not outputs[0].is_cuda:
        return lambda: [output.copy_(new) for output, new in zip(outputs, step(), strict=True)], outputs
    graph = torch.cuda.CUDAGraph()
    # "thread_local": NCCL's threads may call CUDA during the capture.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        outputs = step()
    return graph.replay, outputs


def compare(outputs: Input, expected: Input, tolerance: float) -> tuple[float, int]:
    """Return the relative error's root mean square on the worst rank, and all ranks' wrong elements. Collective.

    An element is wrong if it differs from `expected` by more than `tolerance`, or from rank 0's in any bit.
    """
    error, wrong = 0.0, torch.tensor([0])
    found, exacts = ((values_of(each[:-1]), each[-1]) for each in (outputs, expected))
    for output, exact in zip(found, exacts, strict=True):
        first = output.clone()
        dist.broadcast(first, 0)
        relative = (output.float() - exact) / exact.square().mean().sqrt()
        error = max(error, relative.square().mean().sqrt().item())
        wrong += (~(relative.abs() <= tolerance) | (output != first)).sum().cpu()  # NaN is wrong, too
    dist.all_reduce(wrong)
    return max_over_ranks(error), int(wrong)


def count_other_bits(outputs: Input, others: Input) -> int:
    """Return all ranks' bytes in which two ways' outputs differ. Collective."""
    pairs = zip(outputs, others, strict=True)
    wrong = torch.stack([(one.view(torch.uint8) != other.view(torch.uint8)).sum().cpu() for one, other in pairs]).sum()
    dist.all_reduce(wrong)
    return int(wrong)


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, list[float]]:
    """Return the median over the rounds of how many times as fast ours is, and the quartiles around it."""
    rounds = [other / own for own, other in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return round(median, 4), [round(low, 4), round(high, 4)]


def measure(model: Model, batch: int, backend: comm.Backend, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one batch size, and return a row for each way. Collective."""
    ways, gpu = combines(backend, model), backend.device.type == "cuda"
    bases = {FUSED: SEPARATE} if model.fp8 else {}  # by way, another one with the same bits
    names, tolerance = list(ways), FP8_TOLERANCE if model.fp8 else TOLERANCE
    with comm.capture():
        runs = {way: record(lambda way=way: model.step(batch, ways[way])) for way in names}
    checks: dict[str, list[tuple[float, int]]] = {way: [] for way in names}
    times: dict[str, list[float]] = {way: [] for way in names}
    for number in range(options.rounds):
        if number in {0, options.rounds // 2, options.rounds - 1}:
            model.input.normal_(generator=model.shared)
            expected = model.step(batch, ways[REFERENCE], torch.float32)
            for way in names[:-1]:
                runs[way][0]()
                checks[way].append(compare(runs[way][1], expected, tolerance))
            for way, base in bases.items():
                checks[way].append((0.0, count_other_bits(runs[way][1], runs[base][1])))
        turn = number % len(names)
        for way in names[turn:] + names[:turn]:
            times[way].append(time_us(runs[way][0], options.replays, on_gpu=gpu))
    backend.check()
    mode, size = "graph" if gpu else "eager", (batch * model.shape.hidden * DTYPE.itemsize, batch, model.shape.hidden)
    rows = []
    for way in names:
        low, median, high = statistics.quantiles(times[way], n=4, method="inclusive")
        row = {"batch": batch, "way": way, "us": round(median, 2), "quartiles_us": [round(low, 2), round(high, 2)]}
        if way in OPS:
            route = backend.decision.route(OPS[way], mode, backend.device.type, "bfloat16")
            row["served_by"] = route.backend_for(*size)
        row["times_as_fast"], row["quartiles"] = ratios(times[way], times[REFERENCE])
        if way in bases:
            row["times_as_fast_as_base"], row["quartiles_as_base"] = ratios(times[way], times[bases[way]])
            row["base"] = bases[way]
        row |= {"error": round(max((error for error, _ in checks[way]), default=0.0), 5)}  # "none" isn't compared
        rows.append({**row, "wrong": sum(wrong for _, wrong in checks[way])})
    return rows


def measure_all(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all shapes and batches, print them on rank 0 and return the record. Collective."""
    backend = comm.get_backend()
    show = sys.stdout if dist.get_rank() == 0 else io.StringIO()
    document: dict[str, Any] = {
        **describe(backend.topology),
        "settings": {"dtype": "bfloat16", "cache_tokens": CACHE_TOKENS}
        | ({"tolerance": FP8_TOLERANCE, "quant": QUANT} if options.fp8 else {"tolerance": TOLERANCE})
        | {"graph": device.type == "cuda", "rounds": options.rounds, "replays": options.replays},
        "shapes": {},
        "rows": [],
    }
    show.writelines(f"# {name}: {value}\n" for name, value in document.items() if value)
    for name in options.shape.split(","):
        given = {field: getattr(options, field) for field in ("layers", "distinct") if getattr(options, field)}
        batches = [int(batch) for batch in options.batches.split(",")]
        model = Model(dataclasses.replace(SHAPES[name], **given), max(batches), device, fp8=options.fp8)
        comm.pre_capture_init(max_tokens=max(batches), hidden_size=model.shape.hidden, dtype=DTYPE)
        document["shapes"][name] = {**dataclasses.asdict(model.shape), "nbytes_a_layer_and_rank": model.layer_nbytes}
        show.write(f"# {name}: {document['shapes'][name]}\n")
        for row in (row for batch in batches for row in measure(model, batch, backend, options)):
            document["rows"].append({"shape": name, **row})
            show.write(", ".join(f"{key} {value}" for key, value in document["rows"][-1].items()) + "\n")
            show.flush()
        del model
    document["wrong"] = sum(row["wrong"] for row in document["rows"])
    show.write(f"# Wrong: {document['wrong']}\n")
    return document


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a record."""
    import summarize  # a run doesn't need its dependencies

    summarize.draw(document, path)


def main() -> int:
    """Measure or read, write and draw; return 1 if an element is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="8B,70B", help=f"of {', '.join(SHAPES)}, comma-separated (default 8B,70B)")
    parser.add_argument("--batches", default="1,8,32,128", help="sequences in a batch (default 1,8,32,128)")
    parser.add_argument("--fp8", action="store_true", help="linear layers in FP8, and the ways that quantise")
    parser.add_argument("--layers", type=int, help="layers in a step (8B: 32, 70B: 80)")
    parser.add_argument("--distinct", type=int, help="layers with different weights (8B: 32, 70B: 16)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, at least 2 (default 15)")
    parser.add_argument("--replays", type=int, default=20, help="steps timed together in a round (default 20)")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--plot", type=Path, help="draw the record here; needs matplotlib")
    parser.add_argument("--read", type=Path, help="with --plot: draw this record and measure nothing")
    options = parser.parse_args()
    if options.read:
        draw(json.loads(options.read.read_text()), options.plot)
        return 0
    device = join(parser)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one can't be captured
    document = measure_all(device, options)
    if dist.get_rank() == 0 and options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if dist.get_rank() == 0 and options.plot:
        draw(document, options.plot)
    leave()
    return int(document["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
