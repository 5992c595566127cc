"""What the ranks of the tests of deterministic groups do: sum the same rows in batches of many sizes, compare bits."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core._handle import quant, rank_order
from comm_core.fallback import quantize
from comm_core.types import QUANTS

QUANT = "all_reduce_add_rms_norm_quant"
#: A backend that sums in rank order up to 64 KiB, plain and fused, but for the fault that the name tells. It quantises
#: up to 16 KiB, and its ranges for that have rows that it doesn't norm.
PLUGIN = """
import torch, torch.distributed as dist
import comm_core as comm

FAULT = {fault!r}
CAP = 64 << 10

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        plain = comm.Range("all_reduce", dtypes=("float32", "float16", "bfloat16"), max_nbytes=CAP)
        fused = comm.Range(
            "all_reduce_add_rms_norm",
            dtypes=("bfloat16",),
            max_nbytes=CAP,
            hidden_multiple=8,
            max_tokens=100 if FAULT == "few tokens" else None,
        )
        quant = comm.Range(
            "all_reduce_add_rms_norm_quant",
            dtypes=("float16", "bfloat16"),
            max_nbytes=CAP // 4,
            hidden_multiple=4,
        )
        numerics = "" if FAULT == "unspecified" else "rank_order_fp32"
        return comm.Available(900, (plain, fused, quant), numerics=numerics)

    def total(self, context, tensor):
        assert tensor.nbytes <= CAP and tensor.data_ptr() % 16 == 0 and tensor.is_contiguous()
        parts = [torch.empty_like(tensor) for _ in range(context.world_size)]
        dist.all_gather(parts, tensor, group=context.group)
        if FAULT == "reversed":
            parts.reverse()
        if FAULT == "narrow":
            return sum(parts[1:], parts[0]).float()
        return sum((part.float() for part in parts[1:]), parts[0].float())

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        total = self.total(session, tensor).to(tensor.dtype)
        return total if out is None else out.copy_(total)

    @comm.hookimpl
    def all_reduce_add_rms_norm(self, session, tensor, residual, weight, eps, weight_offset, out, residual_out):
        summed = (self.total(session, tensor) + residual.float()).to(tensor.dtype)
        # In float64, whose rounding to float32 hides the order in which torch sums a row.
        scale = torch.rsqrt(summed.double().square().mean(-1, keepdim=True) + eps).float()
        normed = (summed.float() * scale * (weight.float() + weight_offset)).to(tensor.dtype)
        return (
            normed if out is None else out.copy_(normed),
            summed if residual_out is None else residual_out.copy_(summed),
        )

    @comm.hookimpl
    def all_reduce_add_rms_norm_quant(
        self, session, tensor, residual, weight, eps, weight_offset, quant, scale, out, residual_out, norm_out
    ):
        normed, _ = self.all_reduce_add_rms_norm(
            session, tensor, residual, weight, eps, weight_offset, norm_out, residual_out
        )
        if FAULT == "other norm":  # in the last bit of one element
            normed.view(torch.int16)[-1, -1] ^= 1
        comm.fallback.quantize(normed, quant, scale, out)

plugin = Plugin()
"""


def rows(rank: int, count: int, hidden_size: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Return rows of floats of very unlike sizes: another order of a sum, or another rounding, changes many bits.

    In even columns the large terms of ranks 0 and 1 cancel each other, so that what the order loses shows.
    """
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(count, hidden_size, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-6, 7, (count, hidden_size), generator=generator)
    values = torch.ldexp(values, exponents)
    if rank < 2:
        generator.manual_seed(1000)
        large = torch.rand(values[:, ::2].shape, generator=generator, dtype=torch.float64) + 1
        values[:, ::2] = large * (1 - 2 * rank) * 2**13
    return values.to(dtype).to(device)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def in_rank_order(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    total = inputs[0].to(wide)
    for term in inputs[1:]:
        total = total + term.to(wide)
    return total.to(inputs[0].dtype)


@contextlib.contextmanager
def deterministic(names: Sequence[str] | None, gather_nbytes: int = rank_order.GATHER_NBYTES) -> Any:
    """Yield a deterministic handle of the world; core gathers so many bytes at once."""
    before, rank_order.GATHER_NBYTES = rank_order.GATHER_NBYTES, gather_nbytes
    try:
        handle = comm.get_backend(backends=names, deterministic=True)
        assert handle.decision.deterministic
        assert ", deterministic\n" in handle.explain()
        yield handle
    finally:
        comm.close()
        rank_order.GATHER_NBYTES = before


def run_eager(call: Callable[..., Any], operands: Sequence[torch.Tensor]) -> Any:
    return call(*operands)


def run_in_capture(call: Callable[..., Any], operands: Sequence[torch.Tensor]) -> Any:
    """Run inside `comm.capture()`, as a warm-up does."""
    with comm.capture():
        return call(*operands)


def run_in_graph(call: Callable[..., Any], operands: Sequence[torch.Tensor]) -> Any:
    """Record a call on zeros into a graph, and replay it with the operands."""
    recorded = [torch.zeros_like(operand) for operand in operands]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        results = call(*recorded)
    for place, operand in zip(recorded, operands, strict=True):
        place.copy_(operand)
    graph.replay()
    torch.cuda.synchronize()
    return results


MODES = {"eager": run_eager, "capture": run_in_capture, "graph": run_in_graph}


def sweep_plain(
    handle: comm.Backend,
    counts: Iterable[int],
    hidden_size: int,
    dtypes: Iterable[torch.dtype],
    modes: Iterable[str],
    device: str = "cpu",
) -> int:
    """Sum the first rows of one batch, for each count; return the number of compared calls."""
    counts, compared = sorted(counts), 0
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in dtypes:
        inputs = [rows(r, counts[-1], hidden_size, dtype, device) for r in range(world_size)]
        expected = in_rank_order(inputs)
        for mode in modes:
            for count in counts:
                total = MODES[mode](handle.all_reduce, [inputs[rank][:count]])
                assert same_bits(total, expected[:count]), (handle.name, dtype, mode, count)
                compared += 1
        # Not whole rows: a message that ends within a vector, and one of a single element.
        for numel in (1, 3, hidden_size * counts[-1] - 1):
            total = handle.all_reduce(inputs[rank].view(-1)[:numel])
            assert same_bits(total, expected.view(-1)[:numel]), (handle.name, dtype, numel)
        in_place = inputs[rank].clone()
        assert handle.all_reduce(in_place, out=in_place) is in_place
        assert same_bits(in_place, expected), (handle.name, dtype)
    return compared


def sweep_fused(
    handle: comm.Backend,
    counts: Iterable[int],
    hidden_size: int,
    dtypes: Iterable[torch.dtype],
    modes: Iterable[str],
    device: str = "cpu",
) -> int:
    """Sum, add and norm the first rows of one batch, for each count; return the number of compared calls.

    The sum of all rows together is compared with arithmetic, and its norm with that of few rows.
    """
    counts, compared = sorted(counts), 0
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in dtypes:
        inputs = [rows(r, counts[-1], hidden_size, dtype, device) for r in range(world_size)]
        residual = rows(world_size, counts[-1], hidden_size, dtype, device)
        weight = rows(world_size + 1, 1, hidden_size, dtype, device).view(-1)

        def call(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor = weight) -> Any:
            return handle.all_reduce_add_rms_norm(x, r, weight)

        normed, summed = call(inputs[rank], residual)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        once = in_rank_order([*inputs, residual])  # a kernel's: rounded once
        twice = (in_rank_order(inputs).to(wide) + residual.to(wide)).to(dtype)  # core's, of a rounded sum
        assert same_bits(summed, once) or same_bits(summed, twice), (handle.name, dtype)
        exact = torch.nn.functional.rms_norm(summed.double(), (hidden_size,), weight.double(), 1e-6)
        assert torch.allclose(normed.double(), exact, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-4)
        for mode in modes:
            for count in counts:
                y, s = MODES[mode](call, [inputs[rank][:count], residual[:count]])
                assert same_bits(s, summed[:count]), (handle.name, dtype, mode, count)
                assert same_bits(y, normed[:count]), (handle.name, dtype, mode, count)
                compared += 1
        x, r = inputs[rank].clone(), residual.clone()
        y, s = handle.all_reduce_add_rms_norm(x, r, weight, out=x, residual_out=r)
        assert y is x
        assert s is r
        assert same_bits(y, normed), (handle.name, dtype)
        assert same_bits(s, summed), (handle.name, dtype)
        mine = normed.view(torch.uint8)
        gathered = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(gathered, mine)
        assert all(torch.equal(each, gathered[0]) for each in gathered), (handle.name, dtype)
    return compared


def sweep_quant(
    handle: comm.Backend,
    counts: Iterable[int],
    hidden_size: int,
    dtypes: Iterable[torch.dtype],
    modes: Iterable[str],
    device: str = "cpu",
) -> Counter[str]:
    """Sum, add, norm and quantise the first rows of one batch, for each count and form; compare bits.

    The expected ones are those of the fused call of all rows, quantised.

    Returns:
        The number of compared calls, by the backend that the routes name.
    """
    counts, owners = sorted(counts), Counter[str]()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for dtype in dtypes:
        x = rows(rank, counts[-1], hidden_size, dtype, device)
        residual = rows(world_size, counts[-1], hidden_size, dtype, device)
        weight = rows(world_size + 1, 1, hidden_size, dtype, device).view(-1)
        normed, summed = handle.all_reduce_add_rms_norm(x, residual, weight)
        for form in QUANTS:
            if form == "fp8_per_group" and hidden_size % quant.GROUP_SIZE:
                continue
            given = torch.full((1,), 0.01, device=device) if quant.is_static(form) else None
            scales = quant.empty_scale(x, form, column_major=False) if given is None else given
            values, _ = quantize(normed, form, scales)
            for mode in modes:
                kind = "graph" if mode == "graph" else "eager"
                route = handle.decision.route(QUANT, kind, device, str(dtype).removeprefix("torch."))
                for number, count in enumerate(counts):
                    named = {"quant": form, "scale": given, "with_norm": number % 2 == 0}

                    def call(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor = weight, named: Any = named) -> Any:
                        return handle.all_reduce_add_rms_norm_quant(x, r, w, **named)

                    q, scale, s, y = MODES[mode](call, [x[:count], residual[:count]])
                    what = (handle.name, dtype, form, mode, count)
                    assert torch.equal(q.view(torch.uint8), values[:count].view(torch.uint8)), what
                    assert scale is given or same_bits(scale, scales[:count]), what
                    assert same_bits(s, summed[:count]), what
                    assert y is None or same_bits(y, normed[:count]), what
                    assert (y is not None) is named["with_norm"], what
                    owners[route.backend_for(x[:count].nbytes, count, hidden_size)] += 1
    return owners


def quantising(handle: comm.Backend) -> Counter[str]:
    """Return the number of quantised calls that each backend has served."""
    owners = Counter[str]()
    for item in handle.stats():
        if item.op == QUANT:
            owners[item.backend] += item.calls
    return owners
