"""FlashInfer itself on two GPUs: exact sums, graphs, growth, freed memory, and a rank without memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import comm_core as comm
import comm_plugin_flashinfer_fusion as plugin
import pytest
import torch
import torch.distributed as dist
from comm_plugin_flashinfer_fusion import policy
from fusion_ranks import BF16, BUDGET, Member, check, inputs
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 4096), (2, 2880), (3, 7168), (8, 5120), (33, 2880), (128, 7168), (512, 7168), (1024, 4096), (1, 16384))


def member(max_tokens: int = 0, hidden_size: int = 4096, budget: int = BUDGET) -> Member:
    group = dist.group.WORLD
    assert group is not None
    own = Member(group, torch.device("cuda", dist.get_rank()), budget)
    assert not isinstance(own.connect(), tuple), own.connect
    if max_tokens:
        prepared(own, max_tokens, hidden_size)
    return own


def prepared(own: Member, max_tokens: int, hidden_size: int, dtype: torch.dtype = BF16) -> list[comm.Range]:
    ranges = own.prepare(max_tokens, hidden_size, dtype)
    assert isinstance(ranges, list), ranges
    return ranges


def sums() -> int:
    own, checked = member(), 0
    rank = own.context.rank
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        own.prepare(*shape, dtype)
        tensors = inputs(rank, 2, shape, own.context.device, dtype)
        kept = [tensor.clone() for tensor in tensors]
        for eps, offset in ((1e-6, 0.0), (0.25, 1.0)):
            results = own.fused(*tensors, eps, offset)
            check(results, 2, eps=eps, offset=offset)
            # Both ranks hold the same bits.
            theirs = [torch.empty_like(results[0]) for _ in range(2)]
            dist.all_gather(theirs, results[0])
            assert torch.equal(theirs[0], theirs[1])
        assert all(map(torch.equal, tensors, kept))
        results = own.fused(*tensors, 1e-6, 0.0, tensors[0], tensors[1])
        assert results[0] is tensors[0]
        assert results[1] is tensors[1]
        check(results, 2)
        checked += 1
    plugin.close(own.session, True)
    return checked


def test_sums_are_exact_and_norms_within_a_rounding(ranks: Ranks) -> None:
    count = len(DTYPES) * len(SHAPES)
    assert ranks.run(sums, backend=GPUS, deadline_s=280) == [count] * 2


def replays() -> int:
    own = member(64)
    rank, device = own.context.rank, own.context.device
    static = inputs(rank, 2, (64, 4096), device)
    own.fused(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = own.fused(*static)
        second = own.fused(static[0], first[1], static[2])
    # The graph keeps its workspace when a larger one is prepared.
    older = own.session._workspace
    prepared(own, 512, 4096)
    assert own.session._workspace is not older
    for salt in range(1, 101):
        for tensor, fresh in zip(static, inputs(rank, 2, (64, 4096), device, salt=salt), strict=True):
            tensor.copy_(fresh)
        if (salt + rank) % 3 == 0:
            torch.cuda._sleep(100_000 * (salt % 5))
        graph.replay()
        check(first, 2, salt)
        total = sum(inputs(other, 2, (64, 4096), device, salt=salt)[0].double() for other in range(2))
        assert torch.equal(second[1].double(), first[1].double() + total)
        shape = (salt % 512 + 1, 4096)
        check(own.fused(*inputs(rank, 2, shape, device, salt=salt)), 2, salt)
    torch.cuda.synchronize()
    plugin.close(own.session, True)
    return salt


def test_replays_of_a_graph_go_on_after_growth(ranks: Ranks) -> None:
    assert ranks.run(replays, backend=GPUS, deadline_s=280) == [100, 100]


def two_streams() -> None:
    own = member(256)
    rank, device = own.context.rank, own.context.device
    streams = [torch.cuda.Stream() for _ in range(2)]
    made = [inputs(rank, 2, (1 + 5 * salt, 4096), device, salt=salt) for salt in range(50)]
    torch.cuda.synchronize()
    results = []
    for call, tensors in enumerate(made):
        with torch.cuda.stream(streams[(call + rank) % 2]):
            results.append(own.fused(*tensors))
    torch.cuda.synchronize()
    for salt, result in enumerate(results):
        check(result, 2, salt)
    plugin.close(own.session, True)


def test_calls_on_two_streams_are_ordered(ranks: Ranks) -> None:
    ranks.run(two_streams, backend=GPUS)


def free_nbytes() -> int:
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def starved() -> tuple[Any, int]:
    own = member()
    # The first use allocates memory that stays; it happens before memory is counted.
    prepared(own, 8, 4096)
    own.fused(*inputs(own.context.rank, 2, (8, 4096), own.context.device))
    torch.cuda.synchronize()
    plugin.close(own.session, True)
    before = free_nbytes()
    hog = torch.empty(before - (40 << 20), dtype=torch.uint8, device="cuda") if own.context.rank == 1 else None
    own.connect()
    outcome = own.prepare(1024, 4096)
    plugin.close(own.session, False)
    del hog
    lost = before - free_nbytes()
    own.connect()
    prepared(own, 1024, 4096)
    check(own.fused(*inputs(own.context.rank, 2, (1024, 4096), own.context.device)), 2)
    torch.cuda.synchronize()
    plugin.close(own.session, True)
    return outcome, lost


def test_if_one_rank_has_no_memory_both_fall_back_and_free_theirs(ranks: Ranks) -> None:
    for (failed, reason, rank), lost in ranks.run(starved, backend=GPUS, deadline_s=280):
        assert (failed, rank) == ("failed", 1)
        assert "a workspace for messages of 8388608 bytes needs" in reason
        assert lost < 8 << 20


def closed() -> list[int]:
    free = []
    for _ in range(4):
        own = member()  # in one group: a new group would create communicators of NCCL
        for tokens in (8, 512, 1024):
            prepared(own, tokens, 4096)
            check(own.fused(*inputs(own.context.rank, 2, (tokens, 4096), own.context.device)), 2)
        torch.cuda.synchronize()
        plugin.close(own.session, True)
        free.append(free_nbytes())
    return free


def test_growth_and_close_give_the_memory_back(ranks: Ranks) -> None:
    assert policy.workspace_nbytes(2, 1024 * 4096) > 64 << 20
    for free in ranks.run(closed, backend=GPUS, deadline_s=280):
        assert free[-1] >= free[0] - (8 << 20), free


def routed() -> list[str]:
    handle = comm.get_backend(backends=("flashinfer_fusion",))
    comm.pre_capture_init(max_tokens=256, hidden_size=4096, dtype=BF16)
    rank, device = dist.get_rank(), torch.device("cuda", dist.get_rank())
    route = handle.decision.route("all_reduce_add_rms_norm", "eager", "cuda", "bfloat16")
    for tokens in (1, 256, 257):
        check(handle.all_reduce_add_rms_norm(*inputs(rank, 2, (tokens, 4096), device)), 2)
    named = [route.backend_for(tokens * 8192, tokens, 4096) for tokens in (1, 256, 257)]
    static = inputs(rank, 2, (16, 4096), device)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        results = handle.all_reduce_add_rms_norm(*static)
    for salt in range(3):
        for tensor, fresh in zip(static, inputs(rank, 2, (16, 4096), device, salt=salt), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        check(results, 2, salt)
    torch.cuda.synchronize()
    comm.close()
    return named


def test_it_is_routed_to_once_it_is_prepared(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path, "flashinfer_fusion", "import comm_plugin_flashinfer_fusion as plugin\n")
    for named in ranks.run(routed, backend=GPUS, path=[[folder]] * 2, deadline_s=280):
        assert named == ["flashinfer_fusion", "flashinfer_fusion", "torch_distributed"]
