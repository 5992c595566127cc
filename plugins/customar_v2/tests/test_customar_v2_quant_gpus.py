"""The fused kernels that quantise, on GPUs: the bits of the norm and then the quantisation, eager and in graphs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core.fallback import quantize
from comm_core.types import QUANTS
from comm_plugin_customar_v2.norm_policy import NormRow
from harness import Ranks, install
from kernel_ranks import backend, same, with_a_canary

pytestmark = pytest.mark.gpus(2)
NAME, GPUS, OP = "customar_v2", "cpu:gloo,cuda:nccl", "all_reduce_add_rms_norm_quant"
STATIC, PER_TOKEN, PER_GROUP = QUANTS
DTYPES = (torch.bfloat16, torch.float16)
EPS, OFFSET = 0.01, 1.0
_ANY = 1 << 40
# Every kernel; clusters; grids that take one round and several.
ROWS = (
    *(NormRow(_ANY, "oneshot_push_norm", vecs) for vecs in (1, 2, 4)),
    *(NormRow(_ANY, "oneshot_push_norm", vecs, cluster) for vecs, cluster in ((1, 2), (2, 4), (1, 8))),
    NormRow(_ANY, "oneshot_push_norm", 2, blocks=7),
    *(NormRow(_ANY, "twoshot_push_norm", vecs, pipeline_depth=depth) for vecs, depth in ((1, 0), (2, 2))),
    NormRow(_ANY, "twoshot_push_norm", 2, 2, blocks=16, pipeline_depth=9999),
)
# [num_tokens, hidden_size]: a vector, rows that groups don't fill, models' rows, more rows than blocks, the longest.
MESSAGES = (
    *((1, 8), (3, 264), (1, 128), (2, 2880), (1, 7168), (3, 4096), (33, 5120), (7, 384), (64, 7168), (300, 1024)),
    *((700, 4096), (5, 16384)),
)
LONG = (3, 20480)


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which the plugin, alone, is found by each of two ranks."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v2 as plugin\n")]] * 2


def session_of(handle: comm.Backend) -> Any:
    return handle._serving.sessions[NAME].value


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random numbers; a row of zeros, a tiny one, and one with a NaN, where there are so many."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    found = torch.randn(shape, device="cuda", generator=generator)
    if len(shape) == 2 and shape[0] > 6:
        found[1] = 0
        found[2] *= 1e-8
        found[5, shape[1] // 2] = torch.nan
    return found.to(dtype)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = values(shape[1:], dtype, 6)
    weight[0] = 300.0
    return values(shape, dtype, 1000 * dist.get_rank() + shape[0]), values(shape, dtype, 5), weight


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit; NaNs of every sign are equal."""
    nan = one.isnan()
    alike = one.view(torch.uint8) == other.view(torch.uint8)
    return torch.equal(nan, other.isnan()) and bool((alike | nan).all())


def forms(hidden_size: int) -> list[tuple[dict[str, Any], bool]]:
    """The keywords of the calls, and whether they return the norm."""
    scale = torch.tensor([0.0173], device="cuda")
    found: list[tuple[dict[str, Any], bool]] = []
    for with_norm in (False, True):
        found += [({"quant": STATIC, "scale": scale}, with_norm), ({"quant": PER_TOKEN}, with_norm)]
        if hidden_size % 128 == 0:
            for column_major in (False, True):
                found.append(({"quant": PER_GROUP, "column_major_scales": column_major}, with_norm))
    return found


def served(handle: comm.Backend) -> dict[str, int]:
    """The calls so far by backend."""
    found: dict[str, int] = {}
    for item in handle.stats():
        if item.op == OP:
            found[item.backend] = found.get(item.backend, 0) + item.calls
    return found


def fused(messages: tuple[tuple[int, int], ...], rows: tuple[NormRow, ...]) -> int:
    handle, checked = backend(NAME), 0
    own, newer = session_of(handle), torch.cuda.get_device_capability()[0] >= 9
    for dtype, shape in itertools.product(DTYPES, messages):
        x, residual, weight = inputs(shape, dtype)
        own.set_norm_rows([NormRow(_ANY, "oneshot_push_norm", 2)])
        y, s = handle.all_reduce_add_rms_norm(x, residual, weight, EPS, OFFSET)
        for row, (named, with_norm) in itertools.product(rows, forms(shape[1])):
            if row.cluster > 1 and not newer:
                continue
            own.set_norm_rows([row])
            what = (dtype, shape, row, named, with_norm)
            before = served(handle).get(NAME, 0)
            q, scale, total, norm = handle.all_reduce_add_rms_norm_quant(
                x, residual, weight, EPS, OFFSET, with_norm=with_norm, **named
            )
            assert served(handle)[NAME] == before + 1, (what, "the kernel declined")
            wanted = named["scale"] if named["quant"] == STATIC else torch.empty_like(scale)
            expected, wanted = quantize(y, named["quant"], wanted)
            assert same_bytes(expected, q), (what, (expected.view(torch.uint8) != q.view(torch.uint8)).nonzero()[:3])
            assert torch.equal(scale, wanted), (what, "the scales")
            assert same(total, s), (what, "the sum")
            assert (norm is not None) is with_norm
            assert norm is None or same(norm, y), (what, "the norm")
            checked += 1
        # In place, and nothing written beyond; the inputs of other calls stay as they are.
        own.set_norm_rows([rows[0]])
        kept = x.clone(), residual.clone()
        for form in (STATIC, PER_TOKEN, *((PER_GROUP,) if shape[1] % 128 == 0 else ())):
            flat, behind = with_a_canary(x.flatten())
            flat_residual, behind_residual = with_a_canary(residual.flatten())
            mine, theirs = flat.view(shape), flat_residual.view(shape)
            room = torch.full((x.numel() + 64,), 77, device="cuda", dtype=torch.uint8)
            out = room[: x.numel()].view(torch.float8_e4m3fn).view(shape)
            given = {"scale": torch.tensor([0.0173], device="cuda")} if form == STATIC else {}
            results = handle.all_reduce_add_rms_norm_quant(
                mine, theirs, weight, EPS, OFFSET, quant=form, out=out, residual_out=theirs, norm_out=mine, **given
            )
            assert results[0] is out
            assert results[2] is theirs
            assert results[3] is mine
            expected, _ = quantize(y, form, given.get("scale", torch.empty_like(results[1])))
            assert same_bytes(expected, out), (dtype, shape, form, "in place")
            assert same(theirs, s)
            assert same(mine, y)
            assert (room[x.numel() :] == 77).all()
            assert (behind == 12345).all()
            assert (behind_residual == 12345).all()
        assert same(x, kept[0])
        assert same(residual, kept[1])
    handle.check()
    comm.close()
    return checked


def test_every_kernel_has_the_bits_of_the_norm_and_then_the_quantisation(ranks: Ranks, found: list[list[Path]]) -> None:
    results = ranks.run(fused, MESSAGES, ROWS, backend=GPUS, path=found, deadline_s=280)
    assert results[0] == results[1]
    assert results[0] >= len(DTYPES) * len(MESSAGES) * 4 * sum(row.cluster == 1 for row in ROWS)


@pytest.mark.gpus(4)
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks(ranks: Ranks, found: list[list[Path]], world_size: int) -> None:
    rows = tuple(row for row in ROWS if row.vecs == 2)  # there a thread always has two vectors
    messages = tuple(shape for shape in MESSAGES if shape[0] * shape[1] <= 2 << 20)
    job: dict[str, Any] = {"world_size": world_size, "backend": GPUS, "path": found[:1] * world_size}
    results = ranks.run(fused, messages, rows, deadline_s=280, **job)
    assert set(results) == {results[0]}
    assert results[0] >= len(DTYPES) * len(messages) * 4 * sum(row.cluster == 1 for row in rows)


def test_messages_beyond_a_slot_go_in_several_launches(ranks: Ranks, found: list[list[Path]]) -> None:
    env = {"COMM_CORE_MEMORY_BUDGET_NBYTES": str(2 << 20)}
    messages = ((300, 1024), (41, 7168), (17, 16384))
    results = ranks.run(fused, messages, (ROWS[0], ROWS[8]), backend=GPUS, path=found, env=env, deadline_s=200)
    assert results == [len(DTYPES) * len(messages) * 8 * 2] * 2


def composed_where_declined() -> dict[str, int]:
    handle = backend(NAME)
    x, residual, weight = inputs(LONG, torch.bfloat16)
    y, s = handle.all_reduce_add_rms_norm(x, residual, weight, EPS, OFFSET)
    for form in (PER_TOKEN, PER_GROUP):
        q, scale, total, _ = handle.all_reduce_add_rms_norm_quant(x, residual, weight, EPS, OFFSET, quant=form)
        expected, wanted = quantize(y, form, torch.empty_like(scale))
        assert same_bytes(expected, q)
        assert torch.equal(scale, wanted)
        assert same(total, s)
    calls = served(handle)
    comm.close()
    return calls


def test_rows_that_are_too_long_are_composed(ranks: Ranks, found: list[list[Path]]) -> None:
    results = ranks.run(composed_where_declined, backend=GPUS, path=found, deadline_s=200)
    assert results == [{"torch_distributed": 2}] * 2


def torchs_kernels_agree() -> int:
    """The composition's Triton kernel has the bits of torch's kernels."""
    from comm_core._handle import norm, quant

    count = 0
    for dtype, shape in itertools.product((*DTYPES, torch.float32), ((1, 128), (7, 384), (64, 7168), (3, 20480))):
        rows = values(shape, dtype, 3) * torch.logspace(-6, 3, shape[0], device="cuda")[:, None].to(dtype)
        for form, column_major in itertools.product(QUANTS, (False, True)):
            given = torch.tensor([0.0173], device="cuda")
            scales = [given if form == STATIC else quant.empty_scale(rows, form, column_major) for _ in range(2)]
            one, _ = quant.quantize(rows, form, scales[0])
            other, _ = quant.quantize_by_torch(rows, form, scales[1])
            assert callable(norm._quant_kernels[rows.device, dtype, shape[1], QUANTS.index(form)])
            assert torch.equal(scales[0], scales[1]), (dtype, shape, form)
            assert same_bytes(one, other), (dtype, shape, form)
            count += 1
    return count


def test_tritons_kernel_has_the_bits_of_torchs(ranks: Ranks) -> None:
    assert ranks.run(torchs_kernels_agree, backend=GPUS, deadline_s=250) == [3 * 4 * 6] * 2


def replays(messages: tuple[tuple[int, int], ...], rows: tuple[NormRow, ...], count: int) -> int:
    """Quantised and plain calls in one graph, replayed with other data; the ranks drift apart."""
    handle, rank = backend(NAME), dist.get_rank()
    scale = torch.tensor([0.0173], device="cuda")
    kinds: dict[str, dict[str, Any]] = {
        STATIC: {"scale": scale},
        PER_TOKEN: {"with_norm": True},
        PER_GROUP: {"column_major_scales": True},
    }
    for shape, row in itertools.product(messages, rows):
        session_of(handle).set_norm_rows([row])
        x, residual, weight = inputs(shape, torch.bfloat16)
        torch.cuda.synchronize()
        graph, results, last = torch.cuda.CUDAGraph(), {}, residual
        with torch.cuda.graph(graph):
            for form, named in kinds.items():
                results[form] = handle.all_reduce_add_rms_norm_quant(x, last, weight, EPS, quant=form, **named)
                last = results[form][2]
            plain = handle.all_reduce(last)
        generator = torch.Generator(device="cuda").manual_seed(5)
        for step in range(count):
            x.copy_(torch.randn(shape, device="cuda", generator=generator) + rank)
            residual.copy_(torch.randn(shape, device="cuda", generator=generator))
            if (step + rank) % 3 == 0:
                torch.cuda._sleep(100_000 * (step % 5))
            graph.replay()
            before = residual
            for form, (q, found, total, norm) in results.items():
                y, s = handle.all_reduce_add_rms_norm(x, before, weight, EPS)
                expected, wanted = quantize(y, form, scale if form == STATIC else torch.empty_like(found))
                what = (shape, row, step, form)
                assert same_bytes(expected, q), what
                assert torch.equal(wanted, found), what
                assert same(s, total), what
                assert norm is None or same(norm, y), what
                before = total
            assert same(plain, handle.all_reduce(before)), (shape, row, step)
    handle.check()
    comm.close()
    return count * len(messages) * len(rows)


def test_replays_of_a_graph(ranks: Ranks, found: list[list[Path]]) -> None:
    messages, rows = ((1, 4096), (64, 7168), (500, 4096)), (ROWS[0], ROWS[8])
    results = ranks.run(replays, messages, rows, 30, backend=GPUS, path=found, deadline_s=250)
    assert results == [30 * len(messages) * len(rows)] * 2
