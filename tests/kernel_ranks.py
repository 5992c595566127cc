"""Functions that test a backend of CUDA kernels on ranks with GPUs; the tests of each such plugin run them.

`harness.Ranks` runs those with a parameter `name`, the backend's, on two or more ranks, one GPU each. Those with a
parameter `handle` are parts of them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


@contextlib.contextmanager
def opened(name: str, environ: Mapping[str, str] | None = None) -> Iterator[comm.Backend]:
    """Negotiate the world's handle under these environment variables; close all handles at the end.

    Raises:
        AssertionError: the block raised; the text has the backend and the variables.
    """
    environ = environ or {}
    os.environ.update(environ)
    try:
        handle = backend(name)
        yield handle
        handle.check()
        comm.close()
    except Exception as error:
        raise AssertionError(f"{name}, {dict(environ)}: {type(error).__name__}: {error}") from error
    finally:
        for variable in environ:
            del os.environ[variable]


def every(
    name: str, settings: Sequence[Mapping[str, str]], sizes: Sequence[int], replayed: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """Check, under each of the settings, sums of all sizes and `count` replays of graphs with calls of some sizes.

    Args:
        name: the backend.
        settings: environment variables of which the backend makes a new session each.
        sizes: bytes.
        replayed: bytes of the calls in graphs, one graph each.
        count: the number of replays of each graph.

    Returns:
        For each of the settings how much was compared, and the algorithms of a small, a medium and the largest message.
    """
    found = []
    for environ in settings:
        with opened(name, environ) as handle:
            session: Any = handle._serving.sessions[name].value
            algorithms = [session.algorithm_of(nbytes) for nbytes in (16, 1 << 20, max(sizes))]
            checked = sums(handle, sizes)
            for nbytes in replayed:
                replay(handle, nbytes // 2, count)
        found.append({"algorithms": algorithms, "sums": checked, "replays": len(replayed) * count})
    return found


def check_every(
    results: list[list[dict[str, Any]]],
    settings: Sequence[Mapping[str, str]],
    sizes: Sequence[int],
    replayed: Sequence[int],
    count: int,
) -> None:
    """Check what the ranks returned from `every`: everything ran, and a forced algorithm served all sizes."""
    for found in results:
        assert len(found) == len(settings)
        for environ, each in zip(settings, found, strict=True):
            assert (each["sums"], each["replays"]) == (2 * len(DTYPES) * len(sizes), len(replayed) * count)
            (forced,) = [text.split(":")[0] for name, text in environ.items() if name.endswith("_ALGORITHM")]
            assert not forced or each["algorithms"] == [forced] * 3, environ


def sums(handle: comm.Backend, sizes: Sequence[int]) -> int:
    rank, checked = dist.get_rank(), 0
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
    return checked


def replay(handle: comm.Backend, numel: int, count: int) -> None:
    """Replay a graph of calls between other kernels; the ranks drift apart between replays."""
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


def soak_calls() -> int:
    """Return the number of calls of `mixed`; the variable `SOAK_CALLS` makes it larger."""
    return int(os.environ.get("SOAK_CALLS", "5000"))


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


def killed(name: str, fused: bool = False) -> list[str]:
    """Rank 1 dies; the texts of the errors of the others' next calls, each in a group of its own.

    Args:
        name: the backend.
        fused: whether it also serves the fused operation, which is then called third.

    Returns:
        The text after a call, that of a check after a replay, and that after a fused call.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    others = [dist.new_group(range(size), backend="nccl") for _ in range(1 + fused)]
    handles = [backend(name), *(comm.get_backend(group, backends=(name,)) for group in others)]
    x = torch.ones((8, 4096), device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    steps: list[tuple[Callable[[], object], Callable[[], object]]] = []

    def step(call: Callable[[], object], ask: Callable[[], object] | None = None) -> None:
        call()
        torch.cuda.synchronize()
        steps.append((call, ask or call))

    step(lambda: handles[0].all_reduce(x))
    handles[1].all_reduce(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(160):
            handles[1].all_reduce(x)
    step(graph.replay, handles[1].check)
    if fused:
        step(lambda: handles[2].all_reduce_add_rms_norm(x, x, weight, 0.1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    texts = []
    for call, ask in steps:
        started = time.monotonic()
        call()
        torch.cuda.synchronize()
        took_s = time.monotonic() - started
        assert took_s < 20, took_s
        with pytest.raises(comm.CommTimeoutError) as caught:
            ask()
        assert caught.value.ranks == (1,)
        texts.append(str(caught.value))
    return texts


#: The calls of each case of `late`, how long rank 1's device is late to each, in cycles of its clock, and the least sum
#: of rank 0's waits in microseconds. A device has at most 2 cycles a nanosecond: it is late for 2 ms, or 100 us.
LATE = {"long": (10, 4_000_000, 10_000.0), "short": (50, 200_000, 1_000.0)}


def late(name: str, sizes: Sequence[int], fused: bool = False) -> dict[str, tuple[int, float, float]]:
    """Come late to calls, on rank 1 of two, eager and in graphs.

    Args:
        name: the backend.
        sizes: bytes of the messages.
        fused: whether it also serves the fused operation, which is then called, too.

    Returns:
        This rank's waits for the other, by case: their number, their sum and the longest one so far, in microseconds.
    """
    rank, found = dist.get_rank(), {}
    gc.disable()  # a collection would make a rank late
    with opened(name) as handle:

        def waits() -> tuple[int, float, float]:
            torch.cuda.synchronize()
            by_rank = {item.rank: item for item in handle.waits()}
            assert rank not in by_rank
            item = by_rank.get(1 - rank)
            return (item.waits, item.total_us, item.longest_us) if item else (0, 0.0, 0.0)

        def measure(case: str, run: Callable[[], object]) -> None:
            before = waits()
            dist.all_reduce(torch.zeros(1))  # over Gloo: hosts go on together
            run()
            after = waits()
            found[case] = (after[0] - before[0], after[1] - before[1], after[2])

        def measure_both(case: str, call: Callable[[], object]) -> None:
            for length, (count, cycles, _) in LATE.items():

                def run(count: int = count, cycles: int = cycles) -> None:
                    for _ in range(count):
                        if rank == 1:
                            torch.cuda._sleep(cycles)
                        call()

                call()
                measure(f"{length} eager {case}", run)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                graph.replay()
                measure(f"{length} graph {case}", graph.replay)

        for nbytes in sizes:
            x = torch.zeros(nbytes // 2, device="cuda", dtype=torch.bfloat16)
            measure_both(f"{nbytes}", functools.partial(handle.all_reduce, x))
        if fused:
            x = torch.zeros((16, 4096), device="cuda", dtype=torch.bfloat16)
            weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
            measure_both("fused", lambda: handle.all_reduce_add_rms_norm(x, x.clone(), weight, 1e-6))
        ask_while_a_kernel_waits(handle)
    return found


def ask_while_a_kernel_waits(handle: comm.Backend) -> None:
    """Check that `waits` returns while a kernel waits for rank 1, which calls only after that."""
    rank, x = dist.get_rank(), torch.ones(512, device="cuda")
    turn = torch.zeros(1)  # over Gloo
    if rank == 0:
        handle.all_reduce(x)
        handle.waits()
        assert not torch.cuda.current_stream().query(), "the kernel didn't wait for rank 1"
        dist.all_reduce(turn)
    else:
        dist.all_reduce(turn)
        handle.all_reduce(x)
    torch.cuda.synchronize()


def check_late(results: list[dict[str, tuple[int, float, float]]], cases: int) -> None:
    """Check what the ranks returned from `late` in `cases` cases: rank 0's waits name rank 1, not the reverse."""
    assert all(len(found) == cases for found in results)
    for case, (waits, total_us, longest_us) in results[0].items():
        count, _, least_us = LATE[case.split()[0]]
        assert count * 0.8 <= waits <= count * 10, (case, results)
        assert least_us <= total_us <= waits * longest_us, (case, results)
        assert 2 * results[1][case][1] < total_us, (case, results)


#: Messages of two ranks that no kernel may sum: numels, and names of dtypes.
DIFFERENT_MESSAGES = (
    ((1000, 1008), ("bfloat16", "bfloat16")),
    ((50_000, 400_000), ("float32", "float32")),  # in other grids, and by another algorithm
    ((1001, 1003), ("bfloat16", "bfloat16")),  # in what follows the last vector
    ((1000, 1000), ("bfloat16", "float16")),
    ((2000, 1000), ("float16", "float32")),  # as many bytes
)


def check_differing(results: list[list[str]]) -> None:
    """Check what the ranks returned from `differing`: on some rank each of the messages timed out."""
    assert all(len(texts) == len(DIFFERENT_MESSAGES) for texts in results)
    for message, *texts in zip(DIFFERENT_MESSAGES, *results, strict=True):
        timed_out = ["didn't come within 1 s, or called with another size or dtype" in text for text in texts]
        assert any(timed_out), (message, texts)


def differing(name: str) -> list[str]:
    """For each of the messages, call with this rank's own one and then with a common one; the errors' texts or ""."""
    return [_differing(name, numels, dtypes) for numels, dtypes in DIFFERENT_MESSAGES]


def _differing(name: str, numels: tuple[int, int], dtypes: tuple[str, str]) -> str:
    handle, rank = backend(name), dist.get_rank()
    common = torch.ones(64, device="cuda", dtype=torch.bfloat16)
    handle.all_reduce(common)
    torch.cuda.synchronize()
    text = ""
    try:
        for tensor in (torch.ones(numels[rank], device="cuda", dtype=getattr(torch, dtypes[rank])), common):
            handle.all_reduce(tensor)
            torch.cuda.synchronize()
            handle.check()
    except comm.CommError as error:
        text = str(error)
    comm.close()
    return text
