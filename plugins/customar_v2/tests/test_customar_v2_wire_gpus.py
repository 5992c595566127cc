"""Sums over the FP8 wire on GPUs: their bits, their error bound, in graphs, among exact ones, and what isn't finite."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_plugin_customar_v2 import policy
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v2", "cpu:gloo,cuda:nccl"
HALVES = (torch.bfloat16, torch.float16)
CHUNK = 128
# Bytes: whole chunks, broken ones, parts of unlike length, and tails.
SIZES = (1 << 20, (1 << 20) + 2, (1 << 20) + 256 * 3, (1 << 20) + 510, (3 << 20) + 14, (8 << 20) - 30)
LARGE = ((24 << 20) + 46, 64 << 20)
INFINITY = float("inf")


@pytest.fixture
def found(tmp_path: Path) -> list[Path]:
    return [install(tmp_path, NAME, "import comm_plugin_customar_v2 as plugin\n")]


def arrived(chunks: torch.Tensor) -> torch.Tensor:
    """Return finite floats `[chunks, 128]` as they arrive over the wire."""
    largest = chunks.abs().amax(1, keepdim=True)
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23).clamp(min=9) - 8
    inverse, scale = ((254 - exponent) << 23).view(torch.float32), (exponent << 23).view(torch.float32)
    return (chunks * inverse).to(torch.float8_e4m3fn).float() * scale


def table() -> tuple[policy.Row, ...]:
    return policy.wire_rows_for(9, dist.get_world_size())


def model(inputs: Sequence[torch.Tensor], rows: Sequence[policy.Row] = ()) -> torch.Tensor:
    """Return the sum that every rank gets by a table, by default the group's, if one launch takes the message."""
    row = next(row for row in rows or table() if inputs[0].nbytes <= row.up_to_nbytes)
    one_shot = row.algorithm.startswith("oneshot")
    numel, in_vecs = inputs[0].numel(), inputs[0].numel() // 8 * 8
    terms = [torch.nn.functional.pad(each[:in_vecs].float(), (0, -in_vecs % CHUNK)).view(-1, CHUNK) for each in inputs]
    count = terms[0].shape[0]
    # In one shot all terms are added as they arrive; in two, an owner adds its own as it is.
    owners = (torch.arange(count, device="cuda") // -(-count // len(inputs)))[:, None] if not one_shot else -1
    total = torch.zeros_like(terms[0])
    for rank, term in enumerate(terms):
        total = torch.where(torch.as_tensor(owners == rank, device="cuda"), term, total)
    for rank, term in enumerate(terms):
        total = torch.where(torch.as_tensor(owners == rank, device="cuda"), total, total + arrived(term))
    if not one_shot:
        total = arrived(total)
    tail = torch.zeros(numel - in_vecs, device="cuda")
    for each in inputs:
        tail += each[in_vecs:].float()
    return torch.cat([total.flatten()[:in_vecs], tail]).to(inputs[0].dtype)


def terms(nbytes: int, dtype: torch.dtype, salt: int) -> list[torch.Tensor]:
    """Return each rank's tensor: numbers of like size, of very unlike size, and zeros."""
    inputs = []
    for rank in range(dist.get_world_size()):
        generator = torch.Generator(device="cuda").manual_seed(1_000_003 * rank + nbytes + salt)
        values = torch.randn(nbytes // 2, device="cuda", generator=generator) * 3.0**rank
        exponents = torch.randint(-16, 4, values.shape, device="cuda", generator=generator)
        values[: values.numel() // 2] = torch.ldexp(values, exponents)[: values.numel() // 2]
        values[5000:9000] = 0
        inputs.append(values.to(dtype))
    return inputs


def check(
    got: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    what: object,
    rows: Sequence[policy.Row] = (),
    *,
    in_one_launch: bool = True,
) -> None:
    wide = torch.stack(inputs).double()
    largest = torch.nn.functional.pad(wide, (0, -wide.shape[1] % CHUNK)).view(len(inputs), -1, CHUNK).abs().amax(2)
    floor = largest.sum(0).repeat_interleave(CHUNK)[: wide.shape[1]]
    # The last term is a float16's rounding: the smallest ones have fewer bits.
    bound = 0.13 * wide.abs().sum(0) + 2.0**-16 * floor + 2.0**-24
    assert ((got.double() - wide.sum(0)).abs() <= bound).all(), what
    if in_one_launch:
        expected = model(inputs, rows)
        assert torch.equal(got, expected), (what, (got != expected).nonzero()[:3])
    gathered = [torch.empty_like(got) for _ in inputs]
    dist.all_gather(gathered, got)
    assert all(torch.equal(each.view(torch.int16), got.view(torch.int16)) for each in gathered), what


def opened() -> comm.Backend:
    handle = comm.get_backend(backends=(NAME,), wire="fp8")
    for dtype in ("bfloat16", "float16"):
        for mode in ("eager", "graph"):
            rule = handle.decision.route("all_reduce", mode, "cuda", dtype).rules[0]
            assert (rule.backend, rule.min_nbytes, rule.wire) == (NAME, 1 << 20, "fp8"), handle.explain()
    return handle


def done(handle: comm.Backend) -> None:
    torch.cuda.synchronize()
    handle.check()
    comm.close()


def sums(sizes: Sequence[int], shapes: Sequence[tuple[str, int, int, int, int]]) -> int:
    """Check eager sums by the table and by each algorithm and launch shape, in place and out of place."""
    handle, checked = opened(), 0
    rank = dist.get_rank()
    session = handle._serving.sessions[NAME].value
    largest = table()[-1].up_to_nbytes
    for rows in (table(), *((policy.Row(largest, *shape),) for shape in shapes)):
        session.set_wire_rows(rows)
        for salt, nbytes in enumerate(sizes):
            for dtype in HALVES:
                inputs = terms(nbytes, dtype, salt)
                whole = torch.full((nbytes // 2 + 64,), 7, device="cuda", dtype=dtype)
                mine = whole[: nbytes // 2].copy_(inputs[rank])
                check(handle.all_reduce(mine), inputs, (rows, nbytes, dtype), rows)
                assert torch.equal(mine, inputs[rank]), "the input changed"
                assert handle.all_reduce(mine, out=mine) is mine
                check(mine, inputs, (rows, nbytes, dtype, "in place"), rows)
                assert (whole[nbytes // 2 :] == 7).all(), "written beyond the message"
                checked += 1
    done(handle)
    return checked


def test_sums_have_the_bits_and_the_error_that_are_stated(ranks: Ranks, found: list[Path]) -> None:
    numbers = ((1024, 132), (512, 264), (64, 528), (32, 17))
    shapes = tuple(("oneshot_push_fp8", 1, *each, 0) for each in numbers)
    results = ranks.run(sums, (*SIZES, *LARGE), shapes, backend=GPUS, path=[found] * 2, deadline_s=300)
    assert results == [(len(SIZES) + len(LARGE)) * 2 * (1 + len(shapes))] * 2


@pytest.mark.gpus(4)
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks(ranks: Ranks, found: list[Path], world_size: int) -> None:
    job = {"world_size": world_size, "backend": GPUS, "path": [found] * world_size}
    results = ranks.run(sums, SIZES, (("twoshot_push_fp8", 1, 64, 33, 2),), deadline_s=300, **job)
    assert results == [len(SIZES) * 2 * 2] * world_size
    assert ranks.run(mixed, "twoshot_push_fp8", 300, deadline_s=300, **job) == [300] * world_size


def in_several_launches() -> None:
    handle, inputs = opened(), terms((24 << 20) + 46, torch.bfloat16, 0)
    check(handle.all_reduce(inputs[dist.get_rank()]), inputs, "several launches", in_one_launch=False)
    done(handle)


def test_a_message_that_needs_several_launches(ranks: Ranks, found: list[Path]) -> None:
    env = {"COMM_CORE_MEMORY_BUDGET_NBYTES": str(8 << 20)}
    ranks.run(in_several_launches, backend=GPUS, path=[found] * 2, env=env, deadline_s=200)


def forced(handle: comm.Backend, name: str) -> tuple[policy.Row, ...]:
    """Serve the wire by one algorithm from now on; return the table."""
    rows = (policy.Row(table()[-1].up_to_nbytes, name),)
    handle._serving.sessions[NAME].value.set_wire_rows(rows)
    return rows


def mixed(name: str, calls: int) -> int:
    """Check eager calls and replays of all kinds, quantised and exact, in one random order."""
    handle, rank = opened(), dist.get_rank()
    rows = forced(handle, name)
    graphs = []
    for nbytes in (1 << 20, (2 << 20) + 6, 64 << 10):
        recorded = terms(nbytes, torch.bfloat16, 0)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with comm.capture(), torch.cuda.graph(graph):
            first = handle.all_reduce(recorded[rank])
            second = handle.all_reduce(first)  # the same on all ranks
        graphs.append((nbytes, recorded[rank], graph, first, second))
    weight = torch.ones(2048, device="cuda", dtype=torch.bfloat16)
    dice = random.Random(11)  # noqa: S311 - no secret
    for salt in range(calls):
        kind = dice.randrange(4)
        if kind == 0:
            nbytes, dtype = dice.choice(SIZES), dice.choice(HALVES)
            inputs = terms(nbytes, dtype, salt)
            assert torch.equal(handle.all_reduce(inputs[rank]), model(inputs, rows)), (salt, nbytes, dtype)
        elif kind == 1:
            nbytes, dtype = dice.choice(((4 << 10, HALVES[0]), ((1 << 20) - 2, HALVES[1]), (2 << 20, torch.float32)))
            inputs = [each.to(dtype) for each in terms(nbytes, torch.bfloat16, salt)]
            total = sum((each.float() for each in inputs[1:]), inputs[0].float())
            assert torch.equal(handle.all_reduce(inputs[rank]), total.to(dtype)), (salt, nbytes, dtype)
        elif kind == 2:
            inputs = [each.view(-1, 2048) for each in terms(2 << 20, torch.bfloat16, salt)]
            _, total = handle.all_reduce_add_rms_norm(inputs[rank], torch.zeros_like(inputs[0]), weight)
            exact = sum((each.float() for each in inputs[1:]), inputs[0].float())
            assert torch.equal(total, exact.to(total.dtype)), (salt, "fused")
        else:
            nbytes, place, graph, first, second = graphs[dice.randrange(3)]
            inputs = terms(nbytes, torch.bfloat16, salt)
            place.copy_(inputs[rank])
            graph.replay()
            if nbytes >= 1 << 20:
                assert torch.equal(first, model(inputs, rows)), (salt, nbytes, "replayed")
                assert torch.equal(second, model([first] * len(inputs), rows)), (salt, nbytes, "replayed twice")
    done(handle)
    return calls


def test_quantised_and_exact_calls_and_replays_in_any_order(ranks: Ranks, found: list[Path]) -> None:
    assert ranks.run(mixed, "oneshot_push_fp8", 600, backend=GPUS, path=[found] * 2, deadline_s=300) == [600] * 2


def not_finite() -> None:
    handle, rank, last = opened(), dist.get_rank(), dist.get_world_size() - 1
    rows = forced(handle, "oneshot_push_fp8")
    for dtype in HALVES:
        inputs = terms(1 << 20, dtype, 3)
        clean = model(inputs, rows)
        # In both ranks' parts: NaNs, whole chunks of them among these; infinities of one sign, and of both.
        for first in (20 * CHUNK, 4000 * CHUNK):
            inputs[0][first + 1] = inputs[last][first + 2] = float("nan")
            inputs[last][first + CHUNK : first + 2 * CHUNK] = float("nan")
            inputs[0][first + 2 * CHUNK + 5], inputs[last][first + 2 * CHUNK + 6] = INFINITY, -INFINITY
            inputs[0][first + 3 * CHUNK], inputs[last][first + 3 * CHUNK] = INFINITY, -INFINITY
        inputs[rank].view(torch.int16)[inputs[rank].isnan()] = -1  # the bits of an empty cell
        got = handle.all_reduce(inputs[rank])
        for first in (20 * CHUNK, 4000 * CHUNK):
            assert got[first + 1 : first + 3].isnan().all()
            assert not got[first + 3 : first + CHUNK].isnan().any(), "a NaN spread"
            assert got[first + CHUNK : first + 2 * CHUNK].isnan().all()
            assert got[first + 2 * CHUNK + 5 : first + 2 * CHUNK + 7].tolist() == [INFINITY, -INFINITY]
            assert got[first + 3 * CHUNK].isnan()
            assert torch.equal(got[first + 4 * CHUNK : first + 9 * CHUNK], clean[first + 4 * CHUNK : first + 9 * CHUNK])
        # A largest number of 1.75 times a power of two, and the next one; the smallest and the largest of all.
        tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 8
        for value in (1.75, 1.7578125, tiny, huge, 0.0, -0.0):
            inputs = [torch.full((1 << 19,), value, device="cuda", dtype=dtype) for _ in range(last + 1)]
            check(handle.all_reduce(inputs[rank]), inputs, (dtype, value), rows)
    done(handle)


def test_what_isnt_finite(ranks: Ranks, found: list[Path]) -> None:
    ranks.run(not_finite, backend=GPUS, path=[found] * 2, deadline_s=200)
