"""Padded batches on two GPUs: one graph for every number of real rows, and the bits of calls without padding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core.types import QUANTS
from harness import Ranks, install
from kernel_ranks import backend, same

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v2", "cpu:gloo,cuda:nccl"
#: [num_tokens, hidden_size]: models' rows, rows that fill no warp, fewer rows than blocks, several launches' worth.
SHAPES = ((512, 4096), (512, 5120), (130, 264), (8, 8), (33, 2880), (2048, 7168))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which the plugin, alone, is found by each of two ranks."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v2 as plugin\n")]] * 2


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small ones, whose sums are exact."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(-8, 9, shape, device="cuda", generator=generator).to(dtype)


def numbers_of(rows: int) -> list[int]:
    """Numbers of real rows: around every edge, and beyond the rows on both sides."""
    some = {0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 65, 128, 129, 255, 256, 257, rows // 2, rows - 1, rows}
    return [rows, *sorted(some & set(range(rows + 1))), -5, rows + 100, 1]


def checked_by(handle: comm.Backend, call: Any, plain: Any, outputs: list[torch.Tensor], rows: int) -> int:
    """Compare the real rows of `call`, eager and in a graph, with those of `plain`; return the comparisons."""
    counts = comm.TokenCounts(rows, 0, 1, "cuda")  # no rank has a share of its own
    plain()
    rights = [output.clone() for output in outputs]
    counts.fill(rows)
    call(counts)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        call(counts)
    checked = 0
    for number in numbers_of(rows):
        counts.total.fill_(number)
        for run in (graph.replay, lambda: call(counts)):
            for output in outputs:
                output.view(torch.uint8).fill_(0x42)
            run()
            plain_between = checked % 3 == 0
            real = min(max(number, 0), rows)
            for output, right in zip(outputs, rights, strict=True):
                bits, due = (each[:real].contiguous().view(torch.uint8) for each in (output, right))
                assert torch.equal(bits, due), (number, list(output.shape), output.dtype)
                checked += 1
            if plain_between:  # launches of other kernels follow each other
                plain()
    handle.check()
    return checked


def all_calls() -> dict[str, int]:
    handle, rank, checked = backend(NAME), dist.get_rank(), {"all_reduce": 0, "fused": 0, "quantised": 0}
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        x = integers(shape, dtype, 1 + rank)
        total = sum(integers(shape, dtype, 1 + r).float() for r in range(2))
        out = torch.empty_like(x)
        checked["all_reduce"] += checked_by(
            handle,
            lambda counts: handle.all_reduce(x, out, num_tokens=counts),  # noqa: B023 - called in this turn alone
            lambda: handle.all_reduce(x, out),  # noqa: B023
            [out],
            shape[0],
        )
        handle.all_reduce(x, out)
        assert same(out, total.to(dtype))
        residual, weight = integers(shape, dtype, 9), integers(shape[1:], dtype, 10)
        named = {"out": torch.empty_like(x), "residual_out": torch.empty_like(x)}
        checked["fused"] += checked_by(
            handle,
            lambda counts: handle.all_reduce_add_rms_norm(x, residual, weight, num_tokens=counts, **named),  # noqa: B023
            lambda: handle.all_reduce_add_rms_norm(x, residual, weight, **named),  # noqa: B023
            list(named.values()),
            shape[0],
        )
        if dtype == torch.float32:
            continue
        for form in QUANTS if shape[1] % 128 == 0 else QUANTS[:2]:
            columns = shape[1] // 128 if form == QUANTS[2] else 1
            scale = torch.full((shape[0], columns), 0.02, device="cuda")
            outs = {
                "quant": form,
                "scale": scale[:1, 0].clone() if form == QUANTS[0] else scale,
                "out": torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn),
                "residual_out": torch.empty_like(x),
                "norm_out": torch.empty_like(x),
            }
            written = [outs["out"], outs["residual_out"], outs["norm_out"], *([scale] if form != QUANTS[0] else [])]
            checked["quantised"] += checked_by(
                handle,
                lambda counts: handle.all_reduce_add_rms_norm_quant(x, residual, weight, num_tokens=counts, **outs),  # noqa: B023
                lambda: handle.all_reduce_add_rms_norm_quant(x, residual, weight, **outs),  # noqa: B023
                written,
                shape[0],
            )
    comm.close()
    return checked


def test_every_number_of_real_rows_has_the_bits_of_a_call_without_padding(
    ranks: Ranks, found: list[list[Path]]
) -> None:
    for checked in ranks.run(all_calls, backend=GPUS, path=found, deadline_s=280):
        assert min(checked.values()) > 100, checked


def chain() -> int:
    """Dependent calls of all kinds in one graph, in place, whose number of rows changes from replay to replay."""
    handle, rank, replays = backend(NAME), dist.get_rank(), 0
    rows, hidden = 512, 4096
    x, residual = (torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    counts = comm.TokenCounts(rows, rank, 2, "cuda")

    def step(named: dict[str, Any], x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(10):
            x = handle.all_reduce(x, **named) * 0.25
            y, residual = handle.all_reduce_add_rms_norm(x, residual, weight, residual_out=residual, **named)
            x = y + x
        return x, residual

    counts.fill(rows)
    step({"num_tokens": counts}, x, residual)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        y, s = step({"num_tokens": counts}, x, residual)
    for number in (32, 512, 1, 0, 300, 33, 31, 128, 7, 511, 32):
        x.copy_(integers((rows, hidden), x.dtype, 100 * rank + number))
        residual.copy_(integers((rows, hidden), x.dtype, 3))
        due, due_sum = step({}, x, residual.clone())
        counts.fill(number)
        graph.replay()
        assert same(y[:number], due[:number]), number
        assert same(s[:number], due_sum[:number]), number
        replays += 1
    handle.check()
    comm.close()
    return replays


def test_dependent_calls_in_one_graph(ranks: Ranks, found: list[list[Path]]) -> None:
    assert ranks.run(chain, backend=GPUS, path=found) == [11, 11]


def differing(fused: bool, few: int, many: int) -> tuple[str, tuple[int, ...]]:
    """Rank 1 holds another number than rank 0; return the error by which a rank says so."""
    handle = backend(NAME)
    x, weight = integers((512, 4096), torch.bfloat16, 1), integers((4096,), torch.bfloat16, 2)
    counts = comm.TokenCounts(512, dist.get_rank(), 2, "cuda")

    def call() -> object:
        if fused:
            return handle.all_reduce_add_rms_norm(x, x, weight, num_tokens=counts)
        return handle.all_reduce(x, num_tokens=counts)

    counts.fill(few)
    call()
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        call()
    counts.fill((few, many)[dist.get_rank()])
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    try:
        handle.check()
        found = ("", ())
    except comm.CommTimeoutError as error:
        found = (str(error), error.ranks)
    except comm.CommError as error:  # the other rank has told this one before it looked
        found = (str(error), ())
    comm.close()
    return found


@pytest.mark.parametrize(("few", "many"), [(32, 33), (32, 500), (300, 500)])
@pytest.mark.parametrize("fused", [False, True])
def test_differing_numbers_time_out_by_name(
    ranks: Ranks, found: list[list[Path]], few: int, many: int, *, fused: bool
) -> None:
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "2"}
    results = ranks.run(differing, fused, few, many, backend=GPUS, path=found, env=env)
    # The rank with more rows waits for its peer; the other may learn it from that rank.
    text, late = results[1]
    assert "backend 'customar_v2'" in text
    assert "rank 0 didn't come within 2 s, or called with another size or dtype" in text, results
    assert late == (0,)
