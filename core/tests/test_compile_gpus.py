"""On two GPUs: compiled models whose CUDA graphs Inductor records, and graphs that read how many tokens are real."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core._handle import lookup
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
BUCKET, HIDDEN = 16, 64


def layers(handle: comm.Backend, x: torch.Tensor) -> torch.Tensor:
    """Sums between other kernels; of small integers, so that they are exact."""
    for number in range(3):
        x = handle.all_reduce(x * 2 + number) - x
    return x


def compiled() -> dict[str, Any]:
    """The same model eager and compiled, with data that differ at every step and between the ranks."""
    handle = comm.get_backend()
    model = torch.compile(layers, fullgraph=True, mode="reduce-overhead")
    wrong, capturing = 0, lookup.capturing
    found: list[bool] = []

    def note() -> bool:
        found.append(capturing())
        return found[-1]

    with torch.no_grad(), mock.patch.object(lookup, "capturing", note):
        for step in range(20):
            x = torch.randint(0, 9, (8, HIDDEN), device="cuda", generator=seeded(step)).float()
            torch.compiler.cudagraph_mark_step_begin()
            if step < 4:  # Inductor warms up, then records
                with comm.capture():
                    y = model(handle, x)
            else:
                y = model(handle, x)
            wrong += not torch.equal(y, layers(handle, x))
    name = handle.name
    torch._dynamo.reset()  # frees the graphs, which NCCL's communicators wait for when they are destroyed
    comm.close()
    return {"name": name, "captured": any(found), "wrong": wrong}


def seeded(step: int) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(100 * step + dist.get_rank())


@pytest.mark.parametrize("name", ["torch_distributed", "customar_v2"])
def test_inductor_records_the_calls_in_its_cuda_graphs(ranks: Ranks, tmp_path: Path, name: str) -> None:
    folders = [install(tmp_path, name, f"import comm_plugin_{name} as plugin\n")] if name == "customar_v2" else []
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of processes for three small kernels
    for found in ranks.run(compiled, backend=GPUS, path=[folders] * 2, env=env, deadline_s=280):
        assert found == {"name": name, "captured": True, "wrong": 0}


def counted() -> dict[int, bool]:
    """One graph, replayed for batches of all kinds of lengths: each rank sums the real rows of its chunk."""
    handle, rank, size = comm.get_backend(), dist.get_rank(), dist.get_world_size()
    chunk = BUCKET // size
    counts = comm.TokenCounts(BUCKET, rank, size, "cuda")
    static = torch.zeros(BUCKET, HIDDEN, device="cuda")
    handle.all_reduce(static[0])
    counts.fill(BUCKET)
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        real = torch.arange(chunk, device="cuda")[:, None] < counts.local
        mine = static[rank * chunk : (rank + 1) * chunk]
        total = handle.all_reduce(torch.where(real, mine, 0.0).sum(0))
        number = handle.all_reduce(counts.local.float())
    found = {}
    for num_tokens in (0, 1, chunk - 1, chunk, chunk + 1, BUCKET):
        # What is padding has to be left out: it isn't zero.
        static.copy_(torch.arange(BUCKET * HIDDEN, device="cuda").reshape(BUCKET, HIDDEN) % 97 + num_tokens)
        counts.fill(num_tokens)
        graph.replay()
        right = torch.equal(total, static[:num_tokens].sum(0)) and number.item() == num_tokens
        found[num_tokens] = right and counts.total.item() == num_tokens
    comm.close()
    return found


def test_a_graph_is_replayed_for_any_number_of_tokens(ranks: Ranks) -> None:
    chunk = BUCKET // 2
    for found in ranks.run(counted, backend=GPUS):
        assert found == dict.fromkeys((0, 1, chunk - 1, chunk, chunk + 1, BUCKET), True)
