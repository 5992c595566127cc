"""What runs in the ranks for test_quant_groups.py: quantised results of real sums, composed and by a plugin's hook."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import comm_core as comm
import comm_core.types
import torch
import torch.distributed as dist
from comm_core.fallback import add_rms_norm, quantize
from comm_core.types import QUANTS
from quant_reference import quantized

OPS = torch.ops.comm_core
STATIC, PER_TOKEN, PER_GROUP = QUANTS
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 128), (7, 384), (2, 3, 256), (128,))
#: More than any of these shapes takes: few bytes make a quick admission test.
LARGEST_NBYTES = 1 << 16
KINDS = ("plain", "float32 weight", "float32 residual", "no residual")


class Quantizes:
    """A plugin with every operation, over its own process group; with one fault."""

    COMM_HOOK_API = (1, 0)

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    @comm.hookimpl
    def is_available(self, topology: comm.Topology) -> comm.Available:
        assert topology.one_host
        # Gloo sums no int16.
        return comm.Available(
            500, tuple(comm.Range(op, dtypes=DTYPES, max_nbytes=LARGEST_NBYTES) for op in comm_core.types.OPS)
        )

    @comm.hookimpl
    def all_reduce(self, session: comm.GroupContext, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        out = tensor.clone() if out is None else out.copy_(tensor)
        dist.all_reduce(out, group=session.group)
        return out

    @comm.hookimpl
    def all_reduce_add_rms_norm(
        self,
        session: comm.GroupContext,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.all_reduce(session, tensor, None)
        return add_rms_norm(total, residual, weight, eps, weight_offset, out, residual_out)

    @comm.hookimpl
    def all_reduce_add_rms_norm_quant(
        self,
        session: comm.GroupContext,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        quant: str,
        scale: torch.Tensor,
        out: torch.Tensor,
        residual_out: torch.Tensor,
        norm_out: torch.Tensor | None,
    ) -> None:
        if self.fault in ("declines all", f"declines {quant}"):
            return NotImplemented
        if self.fault == "declines without the norm" and norm_out is None:
            return NotImplemented
        normed, _ = self.all_reduce_add_rms_norm(
            session, tensor, residual, weight, eps, weight_offset, norm_out, residual_out
        )
        quantize(normed, quant, scale, out)
        if self.fault == "value" and norm_out is None:
            out.view(torch.uint8)[-1, -1] ^= 1
        if self.fault == "scale" and quant == PER_GROUP:
            scale[0, -1] *= 1.0000002
        if self.fault == "sum":
            residual_out[-1, -1] += 1
        return None


def inputs(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> list[Any]:
    """This rank's part, the residual and the weight; the last row is 0, and the first part of the first is tiny."""
    rank = dist.get_rank()

    def random(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    x, residual, weight = random(*shape, seed=rank), random(*shape, seed=100), random(shape[-1], seed=101)
    for part in (x.view(-1, shape[-1]), residual.view(-1, shape[-1])):
        part[0, :128] *= 1e-8
        if len(part) > 1:
            part[-1] = 0
    weight[3], weight[5] = 1000.0, torch.nan
    return [
        x.to(dtype),
        None if kind == "no residual" else residual if kind == "float32 residual" else residual.to(dtype),
        weight if kind == "float32 weight" else weight.to(dtype),
    ]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit; NaNs of every sign are equal."""
    nan = one.isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.itemsize]
    alike = one.view(bits) == other.contiguous().view(bits)
    return torch.equal(nan, other.isnan()) and bool((alike | nan).all())


def every_form(shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    """Every form, dtype, shape and kind of inputs: whether the bits are right; a digest of them; who served."""
    backend = comm.get_backend()
    wrong, digest, count = [], hashlib.sha256(), 0
    for form, dtype, shape, kind in itertools.product(QUANTS, DTYPES, shapes, KINDS):
        if dtype is torch.float32 and kind.startswith("float32"):
            continue
        x, residual, weight = inputs(dtype, shape, kind)
        named: dict[str, Any] = {"quant": form}
        if form == STATIC:
            named["scale"] = torch.tensor(0.0123)
        y, s = backend.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 1.0)
        wanted, scales = quantized(y.nan_to_num(nan=0.0), form, named.get("scale"))
        wanted = torch.where(y.isnan(), torch.tensor(torch.nan), wanted.float()).to(wanted.dtype)
        for with_norm, column_major in ((False, False), (True, True)):
            q, found, summed, normed = backend.all_reduce_add_rms_norm_quant(
                x, residual, weight, 1e-5, 1.0, with_norm=with_norm, column_major_scales=column_major, **named
            )
            right = same(wanted, q) and torch.equal(found, scales) and same(s, summed)
            if not right or (normed is not None) is not with_norm or (normed is not None and not same(y, normed)):
                wrong.append((form, str(dtype), shape, kind))
            digest.update(bytes(q.view(torch.uint8).flatten().tolist()))
            count += 1
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for item in backend.stats():
        if item.op.endswith("quant"):
            counts[item.op, item.backend] += item.calls
    candidates = {candidate.name: candidate.reason for candidate in backend.decision.candidates}
    explained = backend.explain()
    comm.close()
    return {
        "wrong": wrong,
        "digest": digest.hexdigest(),
        "count": count,
        "counts": dict(counts),
        "candidates": candidates,
        "explained": explained,
    }


def compiled(compiler: str) -> list[str]:
    """The calls as a graph and as operators; return those whose bits differ from the eager handle's."""
    torch._dynamo.reset()
    backend = comm.get_backend()
    scale = torch.tensor([0.0123])

    def handle(form: str, **named: Any) -> Callable[..., Any]:
        given = {"scale": scale} if form == STATIC else {}
        return lambda *three: backend.all_reduce_add_rms_norm_quant(*three, 1e-5, 1.0, quant=form, **given, **named)

    def into(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> Any:
        scales = torch.empty(x.shape[0], 2)
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
        s, y = torch.empty_like(x), torch.empty_like(x)
        backend.all_reduce_add_rms_norm_quant(
            *(x, residual, weight, 1e-5, 1.0), quant=PER_GROUP, scale=scales, out=out, residual_out=s, norm_out=y
        )
        return out, scales, s, y

    def operator(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> Any:
        q, _, s, _ = OPS.all_reduce_add_rms_norm_quant(x, residual, weight, STATIC, scale, "", 1e-5, 1.0)
        return q, scale, s, None

    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "static": (handle(STATIC), handle(STATIC)),
        "per token": (handle(PER_TOKEN, with_norm=True), handle(PER_TOKEN, with_norm=True)),
        "column-major": (handle(PER_GROUP, column_major_scales=True), handle(PER_GROUP, column_major_scales=True)),
        "into": (into, handle(PER_GROUP, with_norm=True)),
        "operator": (operator, handle(STATIC)),
    }
    different = []
    for name, (call, eager) in calls.items():
        # Inductor takes seconds a graph.
        for kind in ("plain",) if compiler == "inductor" and name != "into" else ("plain", "no residual"):
            torch._dynamo.reset()
            run = torch.compile(call, fullgraph=True, backend=compiler, dynamic=True)
            for tokens in (5, 6):
                x, residual, weight = inputs(torch.bfloat16, (tokens, 256), kind)
                found, right = run(x, residual, weight), eager(x, residual, weight)
                for one, other in zip(found, right, strict=True):
                    if (one is None) is not (other is None) or (one is not None and not same(other, one)):
                        different.append(f"{name}, {kind}, {tokens}")
                if found[1].stride() != right[1].stride():
                    different.append(f"the strides of {name}, {kind}, {tokens}: {found[1].stride()}")
    comm.close()
    return different


def check_operators() -> list[dict[str, str]]:
    """torch's own checks of the operators."""
    comm.get_backend()
    x, residual = (torch.arange(512.0).view(4, 128) % 7 for _ in range(2))
    weight, scale = torch.ones(128), torch.tensor([0.5])
    out = torch.empty(4, 128, dtype=torch.float8_e4m3fn)
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (OPS.all_reduce_add_rms_norm_quant, (x, residual, weight, STATIC, scale), {}),
        (OPS.all_reduce_add_rms_norm_quant, (x, None, weight, PER_TOKEN), {"with_norm": True}),
        (OPS.all_reduce_add_rms_norm_quant, (x, residual, weight, PER_GROUP), {"column_major_scales": True}),
        (
            OPS.all_reduce_add_rms_norm_quant_out,
            (x, residual, weight, STATIC, scale, out, None, torch.empty_like(x), None),
            {},
        ),
        (
            OPS.all_reduce_add_rms_norm_quant_out,
            (x, None, weight, PER_TOKEN, None, out, torch.empty(4, 1), torch.empty_like(x), torch.empty_like(x)),
            {},
        ),
        (OPS.all_reduce_add_rms_norm, (x.bfloat16(), residual, weight), {}),
        (OPS.all_reduce_add_rms_norm, (x, None, weight), {}),
    ]
    # torch can't compare arguments of FP8 on CPUs, as its check of the schema does.
    parts: tuple[str, ...] = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    found = []
    for operator, given, named in cases:
        tests = parts if any(item is out for item in given) else ("test_schema", *parts)
        found.append(torch.library.opcheck(operator.default, given, named, test_utils=tests))
    comm.close()
    return found
