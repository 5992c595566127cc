"""NCCL on real GPUs: every dtype and size, several groups at once, graphs, and a peer that is killed."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_plugin_nccl import library, peers, policy
from harness import DEAD, Ranks, install_entry_point

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
# Bytes: none, around elements and vectors, multiples of no large power of two, and where NCCL changes its protocol.
SIZES = (
    0,
    8,
    24,
    1000,
    1024,
    8192,
    8200,
    65536,
    500 * 5768,
    1 << 20,
    (1 << 20) + 8,
    16 << 20,
    (64 << 20) + 8,
    256 << 20,
)
# NCCL treats these two processes as two hosts with a network between them.
FAR: dict[str, str] = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}


@pytest.fixture
def found(tmp_path: Path) -> Path:
    return install_entry_point(tmp_path, "comm_plugin_nccl", "nccl")


@pytest.fixture(scope="module")
def far_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Separate processes, since NCCL reads its variables once per process."""
    pool = Ranks(tmp_path_factory.mktemp("far"))
    yield pool
    pool.close()


def backend(group: Any = None) -> comm.Backend:
    handle = comm.get_backend(group, backends=("nccl",))
    assert handle.name == "nccl", handle.explain()
    return handle


def integers(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(numel, device="cuda") * (2 * rank + 3) % 8).to(dtype)


def check_sums(handle: comm.Backend, ranks: list[int], sizes: tuple[int, ...]) -> int:
    checked = 0
    for dtype, size in itertools.product(policy.DTYPE_CODES, sizes):
        numel = size // dtype.itemsize
        mine = integers(dist.get_rank(), numel, dtype)
        kept, expected = mine.clone(), torch.zeros_like(mine)
        for rank in ranks:
            expected += integers(rank, numel, dtype)
        got = handle.all_reduce(mine)
        assert torch.equal(got, expected), (dtype, size)
        assert torch.equal(mine, kept), (dtype, size, "the input changed")
        assert got.dtype is dtype
        elsewhere = torch.zeros_like(mine)
        assert handle.all_reduce(mine, out=elsewhere) is elsewhere
        assert torch.equal(elsewhere, expected), (dtype, size, "out")
        assert handle.all_reduce(mine, out=mine) is mine
        assert torch.equal(mine, expected), (dtype, size, "in place")
        checked += 1
    handle.check()
    return checked


def sums(sizes: tuple[int, ...]) -> dict[str, Any]:
    handle = backend()
    checked = check_sums(handle, list(range(dist.get_world_size())), sizes)
    short = handle.all_reduce(torch.full((9,), dist.get_rank(), device="cuda", dtype=torch.int16))
    assert short.tolist() == [sum(range(dist.get_world_size()))] * 9
    facts = [info.facts["nccl"] for info in handle.topology.ranks]
    comm.close()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnccl.so" in line}
    return {"checked": checked, "facts": facts, "loaded": sorted(loaded)}


def test_every_dtype_and_size(ranks: Ranks, found: Path) -> None:
    results = ranks.run(sums, SIZES, backend=GPUS, path=[[found]] * 2, deadline_s=280)
    for result in results:
        assert result["checked"] == len(policy.DTYPE_CODES) * len(SIZES)
        assert len(result["loaded"]) == 1, "one NCCL in the process"
        for facts in result["facts"]:
            assert facts["missing"] is None
            assert facts["nccl"] == ".".join(map(str, torch.cuda.nccl.version()))


def who_serves() -> dict[str, Any]:
    handle = comm.get_backend()
    decision = handle.decision
    total = handle.all_reduce(torch.ones(4096, device="cuda", dtype=torch.bfloat16))
    assert torch.equal(total, torch.full_like(total, dist.get_world_size()))
    comm.close()
    modes = {
        route.mode: [rule.backend for rule in route.rules]
        for route in decision.routes
        if (route.op, route.device_type, route.dtype) == ("all_reduce", "cuda", "bfloat16")
    }
    return {"name": handle.name, "modes": modes}


def test_it_serves_every_size_where_the_others_are_blocked(ranks: Ranks, found: Path, tmp_path: Path) -> None:
    env = {"COMM_CORE_DISABLE": "customar_v1,customar_v2"}
    other = install_entry_point(tmp_path / "other", "comm_plugin_customar_v2", "customar_v2")
    for result in ranks.run(who_serves, backend=GPUS, path=[[found, other]] * 2, env=env):
        assert result["name"] == "nccl"
        for mode in ("eager", "graph"):
            assert result["modes"][mode][0] == "nccl", result["modes"]


def groups_at_once(calls: int) -> int:
    """Groups over the same GPUs, called in turn without synchronising; then recorded in one graph and replayed."""
    handles = [backend(), backend(dist.new_group([0, 1])), backend(dist.new_group([0, 1]))]
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(11)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for call in range(calls):
        size, which, value = torch.randint(0, 1 << 18, (3,), generator=generator).tolist()
        x = torch.full((1 + size % (1 << (1 + call % 18)),), value % 64 + rank, device="cuda", dtype=torch.bfloat16)
        wrong += (handles[which % 3].all_reduce(x) != 2 * (value % 64) + 1).sum()
    assert wrong.item() == 0
    for nbytes in (2, 8192, 1 << 20, (6 << 20) + 14):
        replay(handles, nbytes // 2)
    for handle in handles:
        handle.check()
    comm.close()
    return calls


def replay(handles: list[comm.Backend], numel: int) -> None:
    rank = dist.get_rank()
    comm.pre_capture_init(max_tokens=1, hidden_size=numel, dtype=torch.bfloat16)
    x = torch.zeros(numel, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = handles[0].all_reduce(x)
        second = handles[1].all_reduce(first + rank)
        handles[2].all_reduce(second, out=second)
        third = handles[0].all_reduce(second)
    for step in range(50):
        x.fill_(step % 4 + rank)
        graph.replay()
        one = 2 * (step % 4) + 1
        assert torch.equal(first, torch.full_like(first, one)), (numel, step)
        assert torch.equal(third, torch.full_like(third, (2 * one + 1) * 4)), (numel, step)
        eager = handles[step % 3].all_reduce(torch.full((33,), step + rank, device="cuda", dtype=torch.float32))
        assert torch.equal(eager, torch.full_like(eager, 2 * step + 1))


def test_groups_at_once_eager_and_captured(ranks: Ranks, found: Path) -> None:
    assert ranks.run(groups_at_once, 3000, backend=GPUS, path=[[found]] * 2, deadline_s=280) == [3000] * 2


def two_streams() -> None:
    handle, rank = backend(), dist.get_rank()
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.full((1 << 18,), value + rank, device="cuda", dtype=torch.bfloat16) for value in range(50)]
    torch.cuda.synchronize()
    results = []
    for call, tensor in enumerate(inputs):
        with torch.cuda.stream(streams[(call + rank) % 2]):
            results.append(handle.all_reduce(tensor))
    torch.cuda.synchronize()
    for value, result in enumerate(results):
        assert torch.equal(result, torch.full_like(result, 2 * value + 1))
    comm.close()
    for stream in streams:
        with torch.cuda.stream(stream):
            assert library.current_stream_function()(torch.cuda.current_device()) == stream.cuda_stream


def test_calls_on_two_streams_are_ordered(ranks: Ranks, found: Path) -> None:
    ranks.run(two_streams, backend=GPUS, path=[[found]] * 2)


def killed(in_a_replay: bool) -> dict[str, Any]:
    handle, rank = backend(), dist.get_rank()
    x = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    handle.all_reduce(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(160):
            handle.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if in_a_replay:
        graph.replay()
        torch.cuda.synchronize()
    else:
        # The peer's end may be noticed before the call.
        try:
            handle.all_reduce(x)
            torch.cuda.synchronize()
        except comm.CommTimeoutError as error:
            return {"text": str(error), "ranks": error.ranks}
    with pytest.raises(comm.CommTimeoutError) as caught:
        handle.check() if in_a_replay else handle.all_reduce(x)
    return {"text": str(caught.value), "ranks": caught.value.ranks}


@pytest.mark.parametrize("in_a_replay", [False, True])
def test_a_killed_peer_ends_the_wait_and_is_named(ranks: Ranks, found: Path, in_a_replay: bool) -> None:
    # torch.distributed's NCCL, which is connected as the fallback, would end the process.
    env = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    results = ranks.run(killed, in_a_replay, backend=GPUS, path=[[found]] * 2, env=env, dying=[1])
    assert results[1] == DEAD
    assert results[0]["ranks"] == (1,)
    assert "rank 1, process" in results[0]["text"]
    assert "has ended" in results[0]["text"]


def test_over_a_network(far_ranks: Ranks, found: Path) -> None:
    env = [FAR | {"NCCL_HOSTID": f"host{rank}"} for rank in (0, 1)]
    sizes = (8, 8192, 1 << 20, 16 << 20)
    for result in far_ranks.run(sums, sizes, backend=GPUS, path=[[found]] * 2, env=env, deadline_s=200):
        assert result["checked"] == len(policy.DTYPE_CODES) * len(sizes)


def killed_far() -> str:
    """No process is watched, as if the peer were on another machine."""
    with mock.patch.object(peers, "open_processes", return_value=peers.PeerProcesses({})):
        handle = backend()
    x = torch.ones(1 << 20, device="cuda")
    handle.all_reduce(x)
    torch.cuda.synchronize()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        handle.all_reduce(x)
        torch.cuda.synchronize()
    except comm.CommError as error:
        return str(error)
    with pytest.raises(comm.CommError) as caught:
        handle.check()
    return str(caught.value)


def test_the_end_of_a_peer_beyond_a_network_raises_nccls_error(far_ranks: Ranks, found: Path) -> None:
    env = [FAR | {"NCCL_HOSTID": f"host{rank}"} for rank in (0, 1)]
    results = far_ranks.run(killed_far, backend=GPUS, path=[[found]] * 2, env=env, dying=[1])
    assert results[1] == DEAD
    assert "NCCL: " in results[0]


def closed() -> None:
    handle = backend()
    x = torch.ones(4096, device="cuda")
    handle.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        handle.all_reduce(x)
    comm.close()
    assert ending()
    # Once the graph is gone, NCCL ends the communicator that it kept for it.
    del graph
    deadline = time.monotonic() + 60
    while ending():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ending() -> bool:
    return any(thread.name == "comm-core nccl: end" for thread in threading.enumerate())


def test_a_communicator_ends_after_the_graphs_that_recorded_its_calls(ranks: Ranks, found: Path) -> None:
    ranks.run(closed, backend=GPUS, path=[[found]] * 2, deadline_s=200)
