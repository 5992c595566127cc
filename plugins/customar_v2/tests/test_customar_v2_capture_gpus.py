"""Captured calls on two GPUs, inside `comm.capture()` and outside it, of inputs in memory of every kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
# Elements of bf16: less than a vector; a part of the grid; odd; and large.
NUMELS = (3, 1024, 8190, (1 << 20) + 5, 20 << 20)
REPLAYS = 100
STEPS = range(20)

Layers = Callable[[torch.Tensor], list[torch.Tensor]]


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which the plugin, alone, is found by each of two ranks."""
    return [[install(tmp_path, "customar_v2", "import comm_plugin_customar_v2 as plugin\n")]] * 2


def handle_of(group: dist.ProcessGroup | None = None) -> comm.Backend:
    handle = comm.get_backend(group, backends=("customar_v2",))
    assert handle.name == "customar_v2", handle.explain()
    return handle


def layers_of(*handles: comm.Backend) -> Layers:
    """Calls of several groups between other kernels: out of place, into another tensor, and in place."""

    def layers(x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in range(3):
            handle = handles[layer % len(handles)]
            y = handle.all_reduce(x * (0.5 + layer))
            z = handle.all_reduce(y + x, out=torch.empty_like(x))
            handle.all_reduce(z, out=z)
            x = z / 8
            found += [y, z]
        return found

    return layers


def captured(layers: Layers, x: torch.Tensor, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    layers(x)  # a warm-up, at once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = layers(x)
    return graph, results


def fill(x: torch.Tensor, step: int) -> None:
    """Other data at every step and on every rank; the ranks drift apart."""
    rank = dist.get_rank()
    generator = torch.Generator(device="cuda").manual_seed(1000 * rank + step)
    x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
    if (step + rank) % 3 == 0:
        torch.cuda._sleep(50_000 * (step % 5))


def check_replays(
    graph: torch.cuda.CUDAGraph, results: list[torch.Tensor], layers: Layers, x: torch.Tensor, steps: range = STEPS
) -> int:
    """Replays with fresh data give eager calls' bits, which are interleaved with them; how many were compared."""
    for step in steps:
        fill(x, step)
        graph.replay()
        for number, (got, expected) in enumerate(zip(results, layers(x), strict=True)):
            assert torch.equal(got, expected), (step, number, x.numel())
    return len(steps) * len(results)


def replays(numels: tuple[int, ...], count: int) -> int:
    group = dist.new_group([0, 1], backend="nccl")
    handles = [handle_of(), handle_of(group)]
    layers = layers_of(*handles)
    graphs = []
    for around in (comm.capture, contextlib.nullcontext):
        with around():
            for numel in numels:
                x = torch.zeros(numel, device="cuda", dtype=torch.bfloat16)
                graphs.append((*captured(layers, x), x))
    compared = 0
    # Interleaved: the graphs take turns.
    for begin in range(0, count, 20):
        for graph, results, x in graphs:
            compared += check_replays(graph, results, layers, x, range(begin, min(begin + 20, count)))
    for handle in handles:
        handle.check()
    del graphs, graph, results, x
    comm.close()
    return compared


def test_replays_of_two_groups_calls(ranks: Ranks, found: list[list[Path]]) -> None:
    results = ranks.run(replays, NUMELS, REPLAYS, backend=GPUS, path=found, deadline_s=280)
    assert results == [2 * len(NUMELS) * REPLAYS * 6] * 2


KINDS = ("torch's allocator", "torch.cuda.MemPool", "symmetric memory")


def pools() -> list[int]:
    """Inputs and graphs in memory of several kinds."""
    handle = handle_of()
    compared = [pool_of(kind, handle) for kind in KINDS]
    handle.check()
    comm.close()
    return compared


def pool_of(kind: str, handle: comm.Backend) -> int:
    """The inputs of two graphs share a pool, and addresses."""
    layers = layers_of(handle)
    kept: list[Any] = []
    numels = (8190, 24 << 20)  # the second in several pieces where pieces are of 2 or 20 MiB
    graphs = []
    pool = torch.cuda.graph_pool_handle()
    with comm.capture():
        for numel in numels:
            if kind == "symmetric memory":
                x = symmetric.empty(numel, device="cuda", dtype=torch.bfloat16)
            elif kind == "torch.cuda.MemPool":
                kept.append(torch.cuda.MemPool())
                with torch.cuda.use_mem_pool(kept[-1]):
                    x = torch.empty(numel, device="cuda", dtype=torch.bfloat16)
            else:
                x = torch.empty(numel, device="cuda", dtype=torch.bfloat16)
            # The layers multiply what they are given; so this, too, directly.
            direct = lambda x: [handle.all_reduce(x), *layers(x)]  # noqa: E731
            graphs.append((*captured(direct, x, pool), direct, x))
    compared = sum(check_replays(graph, results, direct, x) for graph, results, direct, x in graphs)
    torch.cuda.synchronize()
    del graphs, direct, x
    kept.clear()
    return compared


def test_memory_of_every_kind(ranks: Ranks, found: list[list[Path]]) -> None:
    assert ranks.run(pools, backend=GPUS, path=found) == [[2 * len(STEPS) * 7] * len(KINDS)] * 2


def closed() -> list[int]:
    free = []
    for _ in range(4):
        handle = handle_of()
        layers, x = layers_of(handle), torch.zeros(24 << 20, device="cuda", dtype=torch.bfloat16)
        with comm.capture():
            graph, results = captured(layers, x)
        check_replays(graph, results, layers, x, range(2))
        comm.close()
        dist.barrier()  # the peer has let go as well
        graph.reset()
        del handle, layers, x, graph, results
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        dist.barrier()
        free.append(torch.cuda.mem_get_info()[0])
    return free


def test_close_after_replays_gives_the_memory_back(ranks: Ranks, found: list[list[Path]]) -> None:
    for free in ranks.run(closed, backend=GPUS, path=found):
        assert free[-1] >= free[0] - (8 << 20), free
