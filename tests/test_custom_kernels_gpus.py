"""customar_v1 and customar_v2 on GPUs, side by side: streams, branches of graphs, kinds of processes, memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import Ranks, install
from kernel_ranks import opened, replay, sums, total

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
# The largest message that each serves, or one in several of the allocator's pieces, in bytes.
LARGE = {"customar_v1": 8 << 20, "customar_v2": 48 << 20}


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which each of two ranks finds both plugins."""
    return [[install(tmp_path / name, name, f"import comm_plugin_{name} as plugin\n") for name in LARGE]] * 2


def filled(numel: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((numel,), value + dist.get_rank(), device="cuda")


def is_all(tensor: torch.Tensor, value: float) -> bool:
    return torch.equal(tensor, torch.full_like(tensor, value))


def streams() -> None:
    for name in LARGE:
        with opened(name) as handle:
            two_streams(handle)
            destroyed_streams(handle)


def two_streams(handle: comm.Backend) -> None:
    """Calls on two streams, in another order of the streams on each rank."""
    rank = dist.get_rank()
    pair = [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.full((1 << 18,), value + rank, device="cuda", dtype=torch.bfloat16) for value in range(50)]
    torch.cuda.synchronize()
    results = []
    for call, tensor in enumerate(inputs):
        with torch.cuda.stream(pair[(call + rank) % 2]):
            results.append(handle.all_reduce(tensor))
    torch.cuda.synchronize()
    for value, result in enumerate(results):
        assert is_all(result, total(value)), value


def destroyed_streams(handle: comm.Backend) -> None:
    """A call on a stream that no longer exists at the next call, on another stream."""
    driver = ctypes.CDLL("libcuda.so.1")
    x = filled(4096)
    torch.cuda.synchronize()
    for number in range(20):
        stream = ctypes.c_void_p()
        assert driver.cuStreamCreate(ctypes.byref(stream), 1) == 0  # 1: it doesn't wait for the default stream
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.value, device=x.device)):
            first = handle.all_reduce(x)
            torch.cuda.current_stream().synchronize()
        assert driver.cuStreamDestroy_v2(stream) == 0
        second = handle.all_reduce(x)
        assert is_all(first, total(1)), number
        assert is_all(second, total(1)), number


def test_calls_on_several_streams_are_ordered(ranks: Ranks, found: list[list[Path]]) -> None:
    ranks.run(streams, backend=GPUS, path=found)


def captures() -> None:
    for name in LARGE:
        with opened(name) as handle:
            beside_a_capture(handle)
            two_branches(handle)


def beside_a_capture(handle: comm.Backend) -> None:
    """A call at once, while another stream captures a call of the same handle."""
    x, other = filled(4096), filled(4096, 5)
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()
    for each in (stream, side):
        with torch.cuda.stream(each):
            handle.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        recorded = handle.all_reduce(x)
        with torch.cuda.stream(side):
            at_once = handle.all_reduce(other)
    torch.cuda.synchronize()
    assert is_all(at_once, total(5))
    for value in range(5):
        x.fill_(value + dist.get_rank())
        graph.replay()
        again = handle.all_reduce(other)
        assert is_all(recorded, total(value)), value
        assert is_all(again, total(5)), value


def two_branches(handle: comm.Backend) -> None:
    """Calls in two branches of one graph, which may run at the same time."""
    inputs = [[filled(numel) for numel in (16 << 10, 256 << 10, 2 << 20)] for _ in range(2)]
    results: list[list[torch.Tensor]] = [[], []]
    for x in inputs[0]:
        handle.all_reduce(x)
    torch.cuda.synchronize()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def record(branch: int) -> None:
        for call in range(12):
            results[branch].append(handle.all_reduce(inputs[branch][(call + branch) % 3]))

    with comm.capture(), torch.cuda.graph(graph):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            record(1)
        record(0)
        current.wait_stream(side)
    for step in range(50):
        for branch, tensors in enumerate(inputs):
            for x in tensors:
                x.fill_(step % 5 + branch + dist.get_rank())
        graph.replay()
        for branch, sums_of in enumerate(results):
            for call, result in enumerate(sums_of):
                assert is_all(result, total(step % 5 + branch)), (step, branch, call)


def test_calls_beside_a_capture_and_in_branches_of_a_graph_are_ordered(ranks: Ranks, found: list[list[Path]]) -> None:
    ranks.run(captures, backend=GPUS, path=found)


def served() -> list[list[str]]:
    """Sums and replays of both backends; the allocators of both ranks, by backend."""
    allocators = []
    for name, nbytes in LARGE.items():
        with opened(name) as handle:
            sums(handle, (14, 8192, (4 << 20) + 46))
            for numel in (8190, nbytes // 2):
                replay(handle, numel, 20)
            allocators.append([info.allocator for info in handle.topology.ranks])
    return allocators


def visible(kind: str) -> list[dict[str, str]]:
    """Return the variable with the GPUs that each of two ranks sees; each uses the first of them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    if kind == "its own alone":  # the first rank by an index, the second by an identifier
        seen = [names[1], f"GPU-{torch.cuda.get_device_properties(0).uuid}"]
    else:
        seen = [f"{names[0]},{names[1]}", f"{names[1]},{names[0]}"]
    return [{"CUDA_VISIBLE_DEVICES": text} for text in seen]


@pytest.mark.parametrize("kind", ["its own alone", "both, in another order"])
def test_ranks_that_see_other_gpus(tmp_path: Path, found: list[list[Path]], kind: str) -> None:
    own = Ranks(tmp_path, visible(kind))  # CUDA reads the variable once per process
    try:
        assert own.run(served, backend=GPUS, path=found, devices=[0, 0]) == [[["native"] * 2] * 2] * 2
    finally:
        own.close()


def test_expandable_segments(tmp_path: Path, found: list[list[Path]]) -> None:
    # Read when a process first allocates; torch has renamed the variable.
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    own = Ranks(tmp_path, [dict.fromkeys(names, "expandable_segments:True")] * 2)
    try:
        assert own.run(served, backend=GPUS, path=found) == [[["expandable_segments"] * 2] * 2] * 2
    finally:
        own.close()


def after_uneven_rendezvous() -> int:
    """The first rank was in one rendezvous of torch's symmetric memory more than the others."""
    import torch.distributed._symmetric_memory as symmetric

    rank = dist.get_rank()
    alone = [dist.new_group([member]) for member in range(dist.get_world_size())]

    def meet() -> Any:
        tensor = symmetric.empty(1024, device="cuda", dtype=torch.float32)
        return tensor, symmetric.rendezvous(tensor, alone[rank])

    kept = meet() if rank == 0 else None
    with opened("customar_v2") as handle:
        checked = sums(handle, (14, 8192))
    if kept is None:
        meet()  # torch counts rendezvous per process, and later tests need equal counts
    return checked


def test_ranks_after_unequal_numbers_of_rendezvous(ranks: Ranks, found: list[list[Path]]) -> None:
    assert len(set(ranks.run(after_uneven_rendezvous, backend=GPUS, path=found))) == 1


def free_nbytes() -> int:
    torch.cuda.synchronize()
    dist.barrier()
    return torch.cuda.mem_get_info()[0]


def suspended() -> dict[str, list[tuple[int, int]]]:
    """Suspend and resume each backend three times; how much memory that freed, and the size of the buffer."""
    return {name: suspend_and_resume(name) for name in LARGE}


def suspend_and_resume(name: str) -> list[tuple[int, int]]:
    found = []
    with opened(name) as handle:
        session: Any = handle._serving.sessions[name].value
        x = filled(4096)
        handle.all_reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph):
            first = handle.all_reduce(x)
            second = handle.all_reduce(first)
        for step in range(3):
            before = free_nbytes()
            comm.suspend()
            found.append((free_nbytes() - before, session.memory_nbytes))
            with pytest.raises(comm.CommError, match="is suspended"):
                handle.all_reduce(x)
            comm.resume()
            for value in range(5):
                x.fill_(10 * step + value + dist.get_rank())
                graph.replay()
                one = total(10 * step + value)
                assert is_all(first, one), (step, value)
                assert is_all(second, dist.get_world_size() * one), (step, value)
                assert is_all(handle.all_reduce(x), one), (step, value)
            sums(handle, (14, 8192, (4 << 20) + 46))
    return found


def test_suspended_groups_give_their_memory_back_and_replay_afterwards(ranks: Ranks, found: list[list[Path]]) -> None:
    for by_name in ranks.run(suspended, backend=GPUS, path=found):
        assert by_name.keys() == LARGE.keys()
        for name, rounds in by_name.items():
            assert len(rounds) == 3
            for freed, nbytes in rounds:
                assert freed >= nbytes > 1 << 20, (name, rounds)
