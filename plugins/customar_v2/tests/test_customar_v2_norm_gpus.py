"""The fused kernels on two GPUs: exact sums, norms within their rounding and of the same bits everywhere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_plugin_customar_v2.norm_policy import NormRow
from harness import Ranks, install
from kernel_ranks import DTYPES, backend, same, soak_calls, with_a_canary

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v2", "cpu:gloo,cuda:nccl"
# Large enough to be missed.
EPS = 0.1
OFFSETS = (0.0, 1.0)
_ANY = 1 << 40
# Every kernel of two ranks; clusters; grids that take one round and several; depths from none to beyond the rounds.
ROWS = (
    *(NormRow(_ANY, "oneshot_push_norm", vecs) for vecs in (1, 2, 4)),
    *(NormRow(_ANY, "oneshot_push_norm", vecs, cluster) for vecs, cluster in ((1, 2), (2, 4), (1, 8))),
    NormRow(_ANY, "oneshot_push_norm", 2, blocks=7),
    NormRow(_ANY, "oneshot_push_norm", 1, 4, blocks=8),
    *(NormRow(_ANY, "twoshot_push_norm", vecs, pipeline_depth=depth) for vecs, depth in ((1, 0), (2, 2))),
    NormRow(_ANY, "twoshot_push_norm", 1, blocks=5, pipeline_depth=1),
    NormRow(_ANY, "twoshot_push_norm", 2, 2, blocks=16, pipeline_depth=9999),
    NormRow(_ANY, "separate"),
)
# [num_tokens, hidden_size]: a vector, models' rows, rows that fill no warp, more rows than blocks, the longest row that
# the kernels take in 16 bit and beyond.
MESSAGES = (
    *((1, 8), (1, 2880), (2, 7168), (3, 4096), (8, 5120), (33, 2880), (7, 264), (64, 7168), (300, 1024), (129, 5120)),
    *((700, 4096), (5, 16384), (3, 20480)),
)


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which the plugin, alone, is found by each of two ranks."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v2 as plugin\n")]] * 2


def session_of(handle: comm.Backend) -> Any:
    return handle._serving.sessions[NAME].value


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def norm_of(total: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    """In fp64."""
    wide = total.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (weight.double() + offset)


def near(norm: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the dtype's rounding, and some more of fp32's."""
    step = torch.finfo(norm.dtype).eps / 2
    return bool(((norm.double() - expected).abs() <= expected.abs() * (step * 1.02 + 4e-6) + 1e-6).all())


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Whether every rank holds the first one's bits."""
    mine = tensor.contiguous().view(torch.uint8)
    first = mine.clone()
    dist.broadcast(first, 0)
    return torch.equal(mine, first)


def placed(shape: tuple[int, int], tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the tensor, and what follows it in memory."""
    copy, behind = with_a_canary(tensor.flatten())
    return copy.view(shape), behind


def fused(messages: tuple[tuple[int, int], ...], rows: tuple[NormRow, ...]) -> int:
    handle, rank, checked = backend(NAME), dist.get_rank(), 0
    own, newer = session_of(handle), torch.cuda.get_device_capability()[0] >= 9
    longest = 32 << 10 if newer or dist.get_world_size() == 2 else 16 << 10
    for dtype, shape in itertools.product(DTYPES, messages):
        route = handle.decision.route("all_reduce_add_rms_norm", "graph", "cuda", str(dtype).removeprefix("torch."))
        assert route.backend_for(shape[0] * shape[1] * dtype.itemsize, *shape) == NAME
        terms = [values(shape, dtype, 1000 * r + shape[0]) for r in range(dist.get_world_size())]
        residual, weight = values(shape, dtype, 5), values(shape[1:], dtype, 6)
        total = sum((term.float() for term in terms[1:]), terms[0].float())  # in rank order
        bits: dict[float, torch.Tensor] = {}
        for row, offset in itertools.product(rows, OFFSETS):
            if row.cluster > 1 and not newer:
                continue
            own.set_norm_rows([row])
            # The longest rows go the separate way, whatever the row of the table says.
            apart = row.algorithm == "separate" or shape[1] * dtype.itemsize > longest
            sums = ((total.to(dtype).float() if apart else total) + residual.float()).to(dtype)
            expected, what = norm_of(sums, weight, offset), (dtype, shape, row, offset)
            (x, behind_x), (r, behind_r) = placed(shape, terms[rank]), placed(shape, residual)
            y, s = handle.all_reduce_add_rms_norm(x, r, weight, EPS, offset)
            assert same(s, sums), (what, (s != sums).nonzero()[:3])
            assert near(y, expected), (what, (y.double() - expected).abs().max())
            assert torch.equal(x, terms[rank]), (what, "the tensor changed")
            assert torch.equal(r, residual), (what, "the residual changed")
            assert same_everywhere(y), (what, "the ranks differ")
            if not apart:
                assert same(y, bits.setdefault(offset, y)), (what, "other bits than another shape's")
            (out, behind), (out_sum, behind_sum) = (
                placed(shape, torch.zeros_like(x)),
                placed(shape, torch.zeros_like(x)),
            )
            got = handle.all_reduce_add_rms_norm(x, r, weight, EPS, offset, out=out, residual_out=out_sum)
            assert got[0] is out
            assert got[1] is out_sum
            assert same(out, y), (what, "out")
            assert same(out_sum, s), (what, "residual_out")
            got = handle.all_reduce_add_rms_norm(x, r, weight, EPS, offset, out=x, residual_out=r)
            assert got[0] is x
            assert got[1] is r
            assert same(x, y), (what, "in place")
            assert same(r, s), (what, "the residual in place")
            for canary in (behind_x, behind_r, behind, behind_sum):
                assert (canary == 12345).all(), (what, "written beyond")
            checked += 1
    handle.check()
    comm.close()
    return checked


def test_fused_calls_give_the_sums_to_the_bit_and_their_norms(ranks: Ranks, found: list[list[Path]]) -> None:
    results = ranks.run(fused, MESSAGES, ROWS, backend=GPUS, path=found, deadline_s=280)
    assert results[0] == results[1]
    assert results[0] >= len(DTYPES) * len(MESSAGES) * 2 * sum(row.cluster == 1 for row in ROWS)


@pytest.mark.gpus(4)
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks(ranks: Ranks, found: list[list[Path]], world_size: int) -> None:
    # There a thread always has two vectors.
    rows = tuple(row for row in ROWS if row.vecs == 2 or row.algorithm == "separate")
    assert len(rows) > 5
    messages = tuple(shape for shape in MESSAGES if shape[0] * shape[1] <= 2 << 20)  # of which all dtypes are served
    job: dict[str, Any] = {"world_size": world_size, "backend": GPUS, "path": found[:1] * world_size}
    results = ranks.run(fused, messages, rows, deadline_s=280, **job)
    assert set(results) == {results[0]}
    assert results[0] >= len(DTYPES) * len(messages) * 2 * sum(row.cluster == 1 for row in rows)


def test_messages_beyond_a_slot_go_in_several_launches(ranks: Ranks, found: list[list[Path]]) -> None:
    env = {"COMM_CORE_MEMORY_BUDGET_NBYTES": str(2 << 20)}
    messages = ((41, 7168), (300, 1024), (17, 16384), (2, 131072))
    rows = (ROWS[0], ROWS[8], NormRow(_ANY, "twoshot_push_norm", 2, pipeline_depth=1), ROWS[-1])
    results = ranks.run(fused, messages, rows, backend=GPUS, path=found, env=env, deadline_s=200)
    assert results == [len(DTYPES) * len(messages) * 2 * len(rows)] * 2


def replays(messages: tuple[tuple[int, int], ...], rows: tuple[NormRow, ...], count: int) -> int:
    handle, newer = backend(NAME), torch.cuda.get_device_capability()[0] >= 9
    for shape, row in itertools.product(messages, rows):
        if row.cluster == 1 or newer:
            session_of(handle).set_norm_rows([row])
            replay(handle, shape, count)
    handle.check()
    comm.close()
    return len(messages) * len(rows) * count


def replay(handle: comm.Backend, shape: tuple[int, int], count: int) -> None:
    """Fused and plain calls in one graph, each reading what one before it wrote; the ranks drift apart."""
    rank = dist.get_rank()
    x, residual = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = (torch.arange(shape[1], device="cuda") % 3 + 1).to(torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Rows of this length come for the first time: what the host then asks the driver may be asked during a capture.
    with torch.cuda.graph(graph):
        first, total = handle.all_reduce_add_rms_norm(x, residual, weight, EPS)
        twice = handle.all_reduce(total)
        second, again = handle.all_reduce_add_rms_norm(x, twice, weight, EPS)
        spare = x + 0
        kept = again + 0
        third, _ = handle.all_reduce_add_rms_norm(spare, kept, weight, EPS, out=spare, residual_out=kept)
        handle.all_reduce(kept, out=kept)
    generator = torch.Generator(device="cuda").manual_seed(5)
    for step in range(count):
        base = torch.randint(-3, 4, shape, device="cuda", generator=generator)
        x.copy_((base + rank).to(torch.bfloat16))
        residual.copy_((base % 5).to(torch.bfloat16))
        if (step + rank) % 3 == 0:
            torch.cuda._sleep(100_000 * (step % 5))
        graph.replay()
        terms = 2 * base + 1
        sums = [terms + base % 5]
        sums.append(terms + 2 * sums[0])
        sums.append(terms + sums[1])
        what = (shape, step)
        for norm, wanted in zip((first, second, third), sums, strict=True):
            assert near(norm, norm_of(wanted.to(torch.bfloat16), weight, 0.0)), what
        for got, wanted in ((total, sums[0]), (twice, 2 * sums[0]), (again, sums[1]), (kept, 2 * sums[2])):
            assert torch.equal(got, wanted.to(torch.bfloat16)), what
        if step % 10 == 0:
            eager = torch.full((3, 2880), step % 7 + rank, device="cuda", dtype=torch.float32)
            _, sum_of = handle.all_reduce_add_rms_norm(eager, eager - rank, torch.ones(2880, device="cuda"), EPS)
            assert torch.equal(sum_of, torch.full_like(eager, 3 * (step % 7) + 1)), what


def test_replays_of_a_graph_of_fused_and_plain_calls(ranks: Ranks, found: list[list[Path]]) -> None:
    messages = ((1, 4096), (3, 2880), (64, 7168), (500, 4096))
    rows = (ROWS[1], ROWS[4], ROWS[9], ROWS[-1])
    results = ranks.run(replays, messages, rows, 60, backend=GPUS, path=found, deadline_s=280)
    assert results == [60 * len(messages) * len(rows)] * 2


def mixed(calls: int) -> int:
    """Fused and plain calls of all sizes in two groups over the same GPUs, without a host's wait between them."""
    group = dist.new_group([0, 1], backend="nccl")
    handles = [backend(NAME), comm.get_backend(group, backends=(NAME,))]
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(11)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for call in range(calls):
        size, which, value = torch.randint(0, 1 << 18, (3,), generator=generator).tolist()
        handle, vecs = handles[which % 2], 1 + size % 1024
        tokens = 1 + size % (1 << (1 + call % 9))
        x = torch.full((tokens, 8 * vecs), value % 32 + rank, device="cuda", dtype=torch.bfloat16)
        total = 2 * (value % 32) + 1
        if value % 3 == 0:
            wrong += (handle.all_reduce(x) != total).sum()
            continue
        y, s = handle.all_reduce_add_rms_norm(x, torch.ones_like(x), torch.ones_like(x[0]))
        wrong += (s != total + 1).sum() + ((y - 1).abs() > 0.01).sum()
    assert wrong.item() == 0
    comm.close()
    return calls


def test_mixed_fused_and_plain_calls(ranks: Ranks, found: list[list[Path]]) -> None:
    calls = soak_calls()
    assert ranks.run(mixed, calls, backend=GPUS, path=found, deadline_s=max(250, calls // 1000)) == [calls] * 2
