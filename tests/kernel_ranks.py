"""Functions that test a backend of CUDA kernels on ranks with GPUs; the tests of each such plugin run them.

Each function's first parameter is the backend's name. `harness.Ranks` runs it on two or more ranks, one GPU each.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bytes: around the sizes of elements, vectors, warps, blocks and grids; odd multiples; where the table changes; and a
# message that needs two launches. Tests round down to whole elements.
SIZES = (
    *(4, 14, 16, 18, 28, 32, 34, 48, 64, 80, 510, 512, 514, 528, 1000, 1024, 8176, 8190, 8192, 8194, 14336, 64 << 10),
    *((64 << 10) + 2, (64 << 10) + 16, 540672, 540674, 129 * 5760, 1 << 20, (1 << 20) - 6, 264 * 512 * 16 + 4),
    *(500 * 5762, 500 * 10240, (4 << 20) + 46, (16 << 20) - 16, (32 << 20) + 92),
)


def reference(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Sum in rank order, in float32, and round once."""
    total = inputs[0].float()
    for tensor in inputs[1:]:
        total = total + tensor.float()
    return total.to(inputs[0].dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bit by bit; all NaNs are equal."""
    numbers = ~one.isnan()
    bits = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.view(bits)[numbers], other.view(bits)[numbers])


def random_bits(rank: int, nbytes: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """Return random bits, with infinities, denormals, both zeros, and NaNs that have the value of an empty cell."""
    generator = torch.Generator(device="cuda").manual_seed(rank * 1_000_003 + nbytes + salt)
    words = torch.randint(-(1 << 31), 1 << 31, (-(-nbytes // 4),), device="cuda", generator=generator).to(torch.int32)
    words[:: 7 + rank] = -1
    words[3 :: 11 + rank] = 0
    words[5::13] = -(1 << 31)
    return words.view(dtype)[: nbytes // dtype.itemsize]


def with_a_canary(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of the tensor, and the 64 bytes that follow it in memory."""
    bits = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    whole = torch.full((tensor.numel() + 64 // tensor.dtype.itemsize,), 12345, device="cuda", dtype=bits)
    copy, behind = whole.view(tensor.dtype)[: tensor.numel()], whole[tensor.numel() :]
    return copy.copy_(tensor), behind


def backend(name: str) -> comm.Backend:
    """Return the world's handle, in which the named backend serves the smallest messages."""
    handle = comm.get_backend(backends=(name,))
    assert handle.name == name, handle.explain()
    return handle


def sums(name: str, sizes: tuple[int, ...]) -> int:
    handle, rank, checked = backend(name), dist.get_rank(), 0
    ranks = range(dist.get_world_size())
    for dtype, size in itertools.product(DTYPES, sizes):
        nbytes = size - size % dtype.itemsize
        integers = [(torch.arange(nbytes // dtype.itemsize, device="cuda") * (r + 3) % 16).to(dtype) for r in ranks]
        for salt, inputs in enumerate((integers, [random_bits(r, nbytes, dtype) for r in ranks])):
            (mine, behind), expected = with_a_canary(inputs[rank]), reference(inputs)
            got = handle.all_reduce(mine)
            assert same(got, expected), (dtype, nbytes, salt, (got != expected).nonzero()[:3])
            assert torch.equal(mine.view(torch.int16), inputs[rank].view(torch.int16)), "the input changed"
            elsewhere, behind_it = with_a_canary(torch.zeros_like(mine))
            assert handle.all_reduce(mine, out=elsewhere) is elsewhere
            assert same(elsewhere, expected), (dtype, nbytes, "out")
            assert handle.all_reduce(mine, out=mine) is mine
            assert same(mine, expected), (dtype, nbytes, "in place")
            assert (behind == 12345).all(), (dtype, nbytes, "in place, written past the end")
            assert (behind_it == 12345).all(), (dtype, nbytes, "out, written past the end")
            checked += 1
    zeros = torch.zeros(4096, device="cuda", dtype=torch.bfloat16)
    assert same(handle.all_reduce(zeros), zeros)
    assert same(handle.all_reduce(-zeros), -zeros)
    handle.check()
    comm.close()
    return checked


def replays(name: str, sizes: tuple[int, ...], count: int) -> int:
    """Replay, for each size, a graph of calls between other kernels; the ranks drift apart between replays."""
    handle = backend(name)
    for nbytes in sizes:
        replay(handle, nbytes // 2, count)
    handle.check()
    comm.close()
    return len(sizes) * count


def replay(handle: comm.Backend, numel: int, count: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.zeros(numel, device="cuda", dtype=torch.bfloat16)
    handle.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = handle.all_reduce(x * 2)
        second = handle.all_reduce(first + rank)
        handle.all_reduce(second, out=second)
        third = second - 1
    generator = torch.Generator(device="cuda").manual_seed(5)
    for step in range(count):
        base = torch.randint(0, 4, (numel,), device="cuda", generator=generator)
        x.copy_((base + rank).to(torch.bfloat16))
        if (step + rank) % 3 == 0:
            torch.cuda._sleep(100_000 * (step % 5))
        graph.replay()
        one = (2 * total(base)).to(torch.bfloat16)
        two = (size * total(one.long()).to(torch.bfloat16)).to(torch.bfloat16)
        assert torch.equal(first, one), (numel, step)
        assert torch.equal(third, two - 1), (numel, step)
        if step % 10 == 0:
            eager = handle.all_reduce(torch.full((33 * 8 + 1,), step % 7 + rank, device="cuda", dtype=torch.float32))
            assert torch.equal(eager, torch.full_like(eager, total(step % 7)))


def total(value: Any) -> Any:
    """Return the sum over all ranks of `value` plus the rank."""
    size = dist.get_world_size()
    return size * value + size * (size - 1) // 2


def two_streams(name: str) -> None:
    handle, rank = backend(name), dist.get_rank()
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.full((1 << 18,), value + rank, device="cuda", dtype=torch.bfloat16) for value in range(50)]
    torch.cuda.synchronize()
    results = []
    for call, tensor in enumerate(inputs):
        with torch.cuda.stream(streams[(call + rank) % 2]):
            results.append(handle.all_reduce(tensor))
    torch.cuda.synchronize()
    for value, result in enumerate(results):
        assert torch.equal(result, torch.full_like(result, total(value)))
    comm.close()


def refused(name: str) -> str:
    handle = backend(name)
    x = torch.ones(64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        handle.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        y = handle.all_reduce(x)
        with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(comm.CommError) as caught:
            handle.all_reduce(x)
    graph.replay()
    assert torch.equal(y, dist.get_world_size() * x)
    return str(caught.value)


def mixed(name: str, calls: int) -> int:
    """Sum random sizes and values in two groups on the same GPUs, without synchronising between calls."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(range(size), backend="nccl")
    handles = [backend(name), comm.get_backend(group, backends=(name,))]
    limit = 128 // size  # so that sums are exact
    generator = torch.Generator().manual_seed(11)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for call in range(calls):
        length, which, value = torch.randint(0, 1 << 18, (3,), generator=generator).tolist()
        numel = 1 + length % (1 << (1 + call % 18))
        x = torch.full((numel,), value % limit + rank, device="cuda", dtype=torch.bfloat16)
        wrong += (handles[which % 2].all_reduce(x) != total(value % limit)).sum()
    assert wrong.item() == 0
    comm.close()
    return calls


def killed(name: str, in_a_replay: bool) -> str:
    handle, rank = backend(name), dist.get_rank()
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
    started = time.monotonic()
    if in_a_replay:
        graph.replay()
    else:
        handle.all_reduce(x)
    torch.cuda.synchronize()
    took_s = time.monotonic() - started
    assert took_s < 20, took_s
    with pytest.raises(comm.CommTimeoutError) as caught:
        handle.check() if in_a_replay else handle.all_reduce(x)
    assert caught.value.ranks == (1,)
    return str(caught.value)


def closed(name: str) -> list[int]:
    free = []
    for _ in range(4):
        handle = backend(name)
        handle.all_reduce(torch.ones(64, device="cuda"))
        comm.close()
        del handle
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    return free


def slept(name: str, numels: tuple[int, ...]) -> list[int]:
    """Replay graphs from before a suspension after it, three times; return the memory that each one freed, in bytes."""
    handle = backend(name)
    x = [torch.zeros(numel, device="cuda", dtype=torch.bfloat16) for numel in numels]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = [handle.all_reduce(tensor) for tensor in x]
    freed = []
    for step in range(3):
        for calls in range(3):  # so that the launch counters differ from the first one
            for tensor in x:
                tensor.fill_(step + calls + dist.get_rank())
            graph.replay()
            for tensor, replayed in zip(x, sums, strict=True):
                eager = handle.all_reduce(tensor)
                assert torch.equal(replayed, torch.full_like(tensor, total(step + calls)))
                assert torch.equal(eager, replayed)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        comm.suspend()
        freed.append(torch.cuda.mem_get_info()[0] - before)
        comm.resume()
    handle.check()
    comm.close()
    return freed


#: Messages of two ranks that no kernel may sum: numels, and names of dtypes.
DIFFERENT_MESSAGES = (
    ((1000, 1008), ("bfloat16", "bfloat16")),
    ((50_000, 400_000), ("float32", "float32")),  # in other grids, and by another algorithm
    ((1001, 1003), ("bfloat16", "bfloat16")),  # in what follows the last vector
    ((1000, 1000), ("bfloat16", "float16")),
    ((2000, 1000), ("float16", "float32")),  # as many bytes
)


def differing(name: str, numels: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    """Call once with this rank's own message, then with a common one; return the error's text, "" if there is none."""
    handle = backend(name)
    rank = dist.get_rank()
    common = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    handle.all_reduce(common)
    torch.cuda.synchronize()
    text = ""
    try:
        for tensor in (torch.ones(numels[rank], device="cuda", dtype=dtypes[rank]), common):
            handle.all_reduce(tensor)
            torch.cuda.synchronize()
            handle.check()
    except comm.CommError as error:
        text = str(error)
    comm.close()
    return text
