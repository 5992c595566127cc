"""What a rank does in a conformance test: the functions that `Kit.run` runs in real processes.

Each has the backend's name as its first parameter, and raises `AssertionError` with the broken rule.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._handle.rank_order import sum_in_rank_order
from comm_core._testing.handles import (
    WARM_HANDLES,
    FusedCall,
    call_and_check,
    check_sum,
    eager_cells,
    first_call,
    open_handle,
    prepare_if_needed,
    synchronize,
    warnings_of_core,
)
from comm_core._testing.inputs import largest_error, make_inputs, make_integers, sum_exactly

__all__ = [
    "a_huge_message_is_summed",
    "a_peer_is_killed",
    "a_rank_is_slow",
    "any_layout_is_summed",
    "closed_groups_leave_nothing",
    "count_held",
    "groups_dont_mix",
    "integers_are_exact",
    "many_calls",
    "outputs_go_where_they_should",
    "preparing_is_repeatable",
    "results",
    "sub_groups_are_served",
    "sums_are_in_rank_order",
    "sums_are_near_the_reference",
    "suspended_and_resumed",
]


def sums_are_near_the_reference(name: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checked = 0
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name, 1 << 17):
            for numel in sizes:
                every = [make_inputs(r, numel, dtype) for r in range(world_size)]
                result = backend.all_reduce(every[rank].to(device, copy=True))
                error = largest_error(result, every)
                assert error <= 1, f"{numel} elements of {dtype} on {device}: {error:.3g} times the error of rounding"
                checked += 1
    assert checked, "the backend serves no eager message"


def integers_are_exact(name: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checked = 0
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name):
            for numel in sizes:
                every = [make_integers(r, world_size, numel, dtype) for r in range(world_size)]
                result = backend.all_reduce(every[rank].to(device, copy=True)).cpu()
                wrong = (result != sum_exactly(every).to(dtype)).nonzero().flatten()
                assert not len(wrong), (
                    f"{numel} elements of {dtype} on {device}: {len(wrong)} are wrong, the first at {wrong[0]}"
                )
                checked += 1
    assert checked, "the backend serves no eager message"


def outputs_go_where_they_should(name: str) -> None:
    """The input is kept unless it is the output; nothing beyond the output is written."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name):
            for numel in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
                every = [make_integers(r, world_size, numel, dtype) for r in range(world_size)]
                expected = sum_exactly(every).to(dtype)
                what = f"{numel} elements of {dtype} on {device}"
                mine = every[rank].to(device, copy=True)
                result = backend.all_reduce(mine)
                assert torch.equal(mine.cpu(), every[rank]), f"{what}: the input changed"
                assert result.data_ptr() != mine.data_ptr(), f"{what}: the result is the input"
                guard = 64
                room = torch.full((numel + guard,), 77, device=device, dtype=dtype)
                out = room[:numel]
                assert backend.all_reduce(mine, out=out) is out, f"{what}: `out` isn't returned"
                assert torch.equal(out.cpu(), expected), f"{what}: `out` has a wrong sum"
                assert bool((room[numel:] == 77).all()), f"{what}: memory behind `out` was written"
                assert torch.equal(mine.cpu(), every[rank]), f"{what}: the input changed in a call with `out`"
                room[:numel] = mine
                assert backend.all_reduce(out, out=out) is out, f"{what}: in place, `out` isn't returned"
                assert torch.equal(out.cpu(), expected), f"{what}: in place, the sum is wrong"
                assert bool((room[numel:] == 77).all()), f"{what}: in place, memory behind the tensor was written"


def any_layout_is_summed(name: str) -> None:
    """Core stages what kernels can't take; the backend sees the copy, and the caller its own tensor's shape."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name, 1 << 16):
            numel = sizes[-1]
            flat = [make_integers(r, world_size, 2 * numel + 1, dtype) for r in range(world_size)]
            total = sum_exactly(flat).to(dtype)
            for what, part in (("strided", slice(0, 2 * numel, 2)), ("misaligned", slice(1, 1 + numel))):
                result = backend.all_reduce(flat[rank].to(device)[part])
                assert torch.equal(result.cpu(), total[part]), f"a {what} tensor of {dtype} on {device}: a wrong sum"
            empty = backend.all_reduce(torch.empty(0, 3, device=device, dtype=dtype))
            assert empty.shape == (0, 3), f"an empty tensor of {dtype} on {device}: its shape became {empty.shape}"


def a_huge_message_is_summed(name: str, on_cpus: bool) -> str:
    """Sum the smallest message beyond 2 GiB that the backend serves; return what is missing for that."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with open_handle(name) as backend:
        found = [
            (device, dtype, numels[0])
            for device, dtype, numels in eager_cells(backend, name, (2 << 30) + (1 << 20), least_nbytes=2 << 30)
        ]
        if not found:
            return "messages beyond 2 GiB"
        if backend.device.type == "cpu" and not on_cpus:
            return "huge_on_cpus = True"
        # On a GPU the one with the most elements, beyond 32-bit indices; on CPUs that takes a minute.
        device, dtype, numel = (max if backend.device.type == "cuda" else min)(found, key=lambda cell: cell[2])
        # The input, the output, and what the backend stages.
        needed = 4 * numel * dtype.itemsize
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory() // world_size
        short = torch.tensor(int(free < needed), device=backend.device)
        dist.all_reduce(short)
        if short.item():
            return f"{needed >> 30} GiB of free memory for each rank"
        x = torch.full((numel,), rank + 1, device=device, dtype=dtype)
        limits = ((1 << 31) // dtype.itemsize, 1 << 31)
        marked = sorted({at % numel for limit in limits for at in (limit - 1, limit)} | {0, numel - 1})
        for number, at in enumerate(marked):
            x[at] = number + rank
        result = backend.all_reduce(x)
        total, pairs = sum(range(1, world_size + 1)), sum(range(world_size))
        for number, at in enumerate(marked):
            expected = world_size * number + pairs
            assert result[at].item() == expected, f"element {at} of {numel} of {dtype} is wrong"
            result[at] = total
        for part in torch.split(result, 1 << 26):
            assert bool((part == total).all()), f"wrong sums of {numel} elements of {dtype}"
    return ""


def _free_memory() -> int:
    """Return the memory that this machine's processes can still take, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def results(name: str, most_nbytes: int) -> list[tuple[str, bytes]]:
    """Return a digest of each result's bits; two runs, and all ranks, can be compared."""
    rank = dist.get_rank()
    found = []
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name, most_nbytes):
            for numel in sizes[::3]:
                result = backend.all_reduce(make_inputs(rank, numel, dtype).to(device)).cpu()
                digest = hashlib.sha256(bytes(result.view(torch.uint8).tolist())).digest()
                found.append((f"{numel} elements of {dtype} on {device}", digest))
    return found


def sums_are_in_rank_order(name: str) -> str:
    """Compare bits with those of the rank order; return the reason if a deterministic group leaves the backend out."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    backend = comm.get_backend(deterministic=True)
    candidate = backend.decision.candidate(name)
    assert candidate is not None, f"{name} isn't among the candidates"
    assert candidate.verdict != "failed", candidate.reason
    session = backend._serving.sessions.get(name)
    assert session is None or not session.failed_cells, session.describe_failed_cells()
    checked = 0
    for device, dtype, sizes in eager_cells(backend, name, 1 << 18):
        for numel in sizes:
            every = [make_inputs(r, numel, dtype) for r in range(world_size)]
            result = backend.all_reduce(every[rank].to(device, copy=True)).cpu()
            expected = sum_in_rank_order(every)
            same = torch.equal(result.view(torch.uint8), expected.view(torch.uint8))
            assert same, f"{numel} elements of {dtype} on {device} have other bits than in rank order"
            checked += 1
    comm.close()
    assert checked or candidate.verdict == "unavailable", "the backend serves no eager message"
    return "" if checked else candidate.reason


def many_calls(name: str, count: int) -> None:
    """Calls of changing sizes without waiting between them; ranks that come late, in turn."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with open_handle(name) as backend:
        cells = list(eager_cells(backend, name, 1 << 18))
        kept = []
        for call in range(count):
            device, dtype, sizes = cells[call % len(cells)]
            numel = sizes[(7 * call) % len(sizes)]
            every = [make_integers(r, world_size, numel, dtype, call) for r in range(world_size)]
            if call % 50 == rank:
                time.sleep(0.002 * (call % 7))
            kept.append((call, every, backend.all_reduce(every[rank].to(device, copy=True))))
            if len(kept) == 20 or call == count - 1:
                for number, terms, result in kept:
                    expected = sum_exactly(terms).to(result.dtype)
                    assert torch.equal(result.cpu(), expected), f"call {number}, of {expected.numel()} elements"
                kept.clear()


def groups_dont_mix(name: str) -> None:
    """Two groups of all ranks, their calls alternating, and values that differ between the groups."""
    kind = dist.get_backend_config()
    second = dist.new_group(range(dist.get_world_size()), backend=str(kind))
    with open_handle(name) as one, open_handle(name, second) as other:
        for call in range(30):
            for salt, backend in enumerate((one, other) if call % 2 else (other, one)):
                for device, dtype, sizes in itertools.islice(eager_cells(backend, name, 1 << 14), 2):
                    numel = sizes[call % len(sizes)]
                    check_sum(backend, device, dtype, numel, f"call {call} of group {salt}", salt=salt + call)


def sub_groups_are_served(name: str) -> list[str]:
    """Groups that leave out the first rank, and then the last; a group of their own for those that are left out."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    kind = str(dist.get_backend_config())
    served = []
    for members in (range(1, world_size), range(world_size - 1)):
        group = dist.new_group(list(members), backend=kind)
        if rank in members:
            backend = comm.get_backend(group)
            for device, dtype, sizes in eager_cells(backend, name, 1 << 16):
                for numel in sizes[:: max(1, len(sizes) // 4)]:
                    check_sum(backend, device, dtype, numel, f"ranks {list(members)}", members)
                    served.append(f"{list(members)}")
            comm.close(group)
        dist.barrier()
    return served


def preparing_is_repeatable(name: str) -> None:
    """`pre_capture_init` twice for one shape, then for larger ones; earlier shapes stay served."""
    with open_handle(name) as backend:
        dtype = first_call(name, backend).dtype
        for max_tokens in (4, 4, 16, 64):
            comm.pre_capture_init(max_tokens=max_tokens, hidden_size=64, dtype=dtype)
            candidate = backend.decision.candidate(name)
            assert candidate is not None
            assert candidate.verdict != "failed", f"{max_tokens} tokens: {candidate.reason}"
            for tokens in (1, 4):
                what = f"{tokens} tokens after {max_tokens}"
                check_sum(backend, backend.device, dtype, tokens * 64, what)
                if dtype.is_floating_point:
                    fused = FusedCall(backend, dtype, (tokens, 64))
                    fused.check_results(fused(), what)


def closed_groups_leave_nothing(name: str, count: int) -> None:
    """Get and close handles; what the process holds mustn't grow with each."""
    held = []
    for _ in range(WARM_HANDLES + count):
        with warnings_of_core() as logged, open_handle(name) as backend:
            call = first_call(name, backend)
            call.check_results(call(), "a new handle")
            del call
        assert not logged, f"core logged: {logged}"
        del backend
        dist.barrier()
        held.append(count_held())
    comm.close()  # a second close does nothing
    counts = {what: [step[what] for step in held[WARM_HANDLES - 1 :]] for what in held[0]}
    # Other programs may add a segment now and then.
    grown = {what: row for what, row in counts.items() if all(a < b for a, b in itertools.pairwise(row))}
    assert not grown, f"left behind by closed groups, counted after each: {grown}"


def count_held() -> dict[str, int]:
    """Count what this process holds, by kind; GPU memory in MiB, as a negative number of what is free."""
    gc.collect()
    found = {
        "open descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "shared mappings": sum(line.split()[1][3] == "s" for line in Path("/proc/self/maps").read_text().splitlines()),
        "segments in /dev/shm": len(list(Path("/dev/shm").iterdir())),  # noqa: S108 - only counted
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        found["MiB of GPU memory"] = -(torch.cuda.mem_get_info()[0] >> 20)
    return found


def suspended_and_resumed(name: str) -> None:
    with open_handle(name) as backend:
        call = first_call(name, backend)
        for _ in range(3):
            comm.suspend()
            try:
                call()
            except comm.CommError:
                pass
            else:
                raise AssertionError("a call between suspend and resume didn't raise")
            comm.resume()
            for _ in range(3):
                call.check_results(call(), "after resume")


def a_peer_is_killed(name: str) -> tuple[str, str, float]:
    """The last rank dies; the others' next call must raise within the wait's limit."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    backend = comm.get_backend(backends=(name,))
    prepare_if_needed(backend, name)
    call = first_call(name, backend)
    call()
    synchronize(backend)
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        call_and_check(name, backend)
    except comm.CommError as error:
        outcome = (type(error).__name__, str(error), time.monotonic() - start)
    else:
        raise AssertionError("calls without the killed rank returned")
    try:
        call()
    except comm.CommError:
        return outcome
    raise AssertionError("a call after the failure returned")


def a_rank_is_slow(name: str, delay_s: float) -> None:
    """Each rank in turn comes late by less than the wait's limit."""
    with open_handle(name) as backend:
        call = first_call(name, backend)
        for late in range(dist.get_world_size()):
            if dist.get_rank() == late:
                time.sleep(delay_s)
            call.check_results(call(), f"rank {late} came late by {delay_s} s")
