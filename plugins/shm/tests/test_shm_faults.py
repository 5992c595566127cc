"""Ranks that make different calls, stop, or compute in another floating-point mode: real processes."""

from __future__ import annotations

import ctypes
import platform
import time
from pathlib import Path

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import Ranks, install
from test_shm_session import backend_of_shm

#: The chunk's size, in bytes: larger messages take several chunks.
CHUNK_NBYTES = 512 << 10
#: (elements, dtype) of the first rank and of the others.
DIFFERENT = {
    "a little larger": ((1000, torch.float32), (1200, torch.float32)),
    "another number of chunks": ((1000, torch.float32), (200_000, torch.float32)),
    "another algorithm": ((100, torch.float32), (100_000, torch.float32)),
    "the same first chunk": ((CHUNK_NBYTES // 4, torch.float32), (CHUNK_NBYTES, torch.float32)),
    "as many bytes": ((1000, torch.float32), (2000, torch.float16)),
    "as many elements and bytes": ((1000, torch.float32), (1000, torch.int32)),
    "signed and unsigned": ((1000, torch.int8), (1000, torch.uint8)),
    "empty": ((0, torch.float32), (64, torch.float32)),
    "one element": ((1, torch.int64), (1, torch.float64)),
}


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    return install(tmp_path, "shm", "import comm_plugin_shm as plugin\n")


def call_differently(how: str, odd: int) -> list[str]:
    """Sum alike, then differently on the rank `odd`, then alike."""
    backend = backend_of_shm()
    numel, dtype = DIFFERENT[how][dist.get_rank() != odd]
    said = []
    for x in (torch.ones(300_000), torch.ones(numel, dtype=dtype), torch.ones(100), torch.ones(100)):
        try:
            y = backend.all_reduce(x)
            said.append("right" if bool((y == dist.get_world_size()).all()) else f"wrong: {y.unique()}")
        except comm.CommError as error:  # noqa: PERF203 - each call is looked at
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("how", "world_size", "odd"),
    [(how, 2, 0) if number % 2 else (how, 3, 1) for number, how in enumerate(DIFFERENT)],
)
def test_different_messages_are_named_and_never_summed(
    ranks: Ranks, shm: Path, how: str, world_size: int, odd: int
) -> None:
    # Core sums a zero for an empty tensor.
    (mine, my_dtype), (theirs, their_dtype) = ((max(numel, 1), dtype) for numel, dtype in DIFFERENT[how])
    found = ranks.run(call_differently, how, odd, world_size=world_size, path=[[shm]] * world_size)
    named = 0
    for rank, (first, second, *later) in enumerate(found):
        assert first == "right"
        peer = (0 if odd else 1) if rank == odd else odd
        texts = (f"{mine} element{'s' * (mine > 1)} of {my_dtype}", f"{theirs} elements of {their_dtype}")
        if theirs == 1:
            texts = (texts[0], f"1 element of {their_dtype}")
        own, other = texts if rank == odd else texts[::-1]
        # A rank that another one was faster than says only that. Either may add what the other said before.
        said, _, _ = second.partition(". Before that, ")
        if "found that another rank made a different call" not in said:
            assert f"the ranks made different calls: rank {peer} reduced {other}, this rank {own}" in said
            named += 1
        assert all("This handle refuses further calls" in text for text in later)
    assert named


def call_after_a_refusal() -> list[str]:
    """Make a call that only rank 1's check refuses, then a call of another size on all ranks."""
    backend = backend_of_shm()
    said = []
    for x, out in ((torch.ones(1000), torch.zeros(7) if dist.get_rank() == 1 else None), (torch.ones(100), None)):
        try:
            backend.all_reduce(x, out)
            said.append("summed")
        except (ValueError, comm.CommError) as error:  # noqa: PERF203 - each call is looked at
            said.append(type(error).__name__)
    return said


def test_a_call_that_one_rank_refused_is_not_paired_with_the_next(ranks: Ranks, shm: Path) -> None:
    first, second = ranks.run(call_after_a_refusal, path=[[shm]] * 2)
    assert first == ["CommError", "CommError"]
    assert second == ["ValueError", "CommError"]


def stop_and_call(by_close: bool) -> tuple[str, bool]:
    """Stop rank 1's session; return what the others' waiting call raises, and whether it waited for its deadline."""
    backend = backend_of_shm()
    session = backend._serving.sessions["shm"]
    x = torch.ones(10)
    backend.all_reduce(x)
    if dist.get_rank() == 1:
        time.sleep(1)  # the others wait by now
        if by_close:
            session.close(orderly=False)
        else:
            session.abort()
            session.abort()
            with pytest.raises(comm.CommError, match="rank 1 stopped after a failure"):
                backend.all_reduce(x)
        return "", False
    start = time.monotonic()
    with pytest.raises(comm.CommError) as caught:
        backend.all_reduce(x)
    assert not isinstance(caught.value, comm.CommTimeoutError)
    return str(caught.value), time.monotonic() - start > 200


@pytest.mark.parametrize("by_close", [False, True])
def test_peers_dont_wait_for_a_rank_that_stopped(ranks: Ranks, shm: Path, by_close: bool) -> None:
    for text, waited in ranks.run(stop_and_call, by_close, world_size=3, path=[[shm]] * 3)[::2]:
        assert "rank 1 stopped after a failure" in text
        assert not waited


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXACT = {
    dtype: torch.tensor(
        [info.smallest_normal / 4, info.smallest_normal * 1.5, 1.0, 1.0 + info.eps, 3 * info.eps / 4],
        dtype=torch.float64,
    ).to(dtype)
    for dtype, info in ((dtype, torch.finfo(dtype)) for dtype in FLOATS)
}
# `fesetround`'s FE_UPWARD and FE_TONEAREST.
_UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}
_TO_NEAREST = 0


def sum_in_another_mode(mode: str) -> dict[str, list[int]]:
    """Sum subnormals and numbers that need rounding; rank 1 computes in another mode. Return the sums' bits."""
    backend = backend_of_shm()
    found = {}
    odd = dist.get_rank() == 1
    libm = ctypes.CDLL("libm.so.6")
    if mode == "round up" and odd:
        assert libm.fesetround(_UPWARD[platform.machine()]) == 0
    if mode == "flush" and odd and not torch.set_flush_denormal(True):
        return {}
    try:
        for dtype in FLOATS:
            x = _EXACT[dtype].repeat(33)  # made before, since this thread's mode may change it
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
            found[str(dtype)] = backend.all_reduce(x).view(bits).tolist()
    finally:
        torch.set_flush_denormal(False)
        libm.fesetround(_TO_NEAREST)
    return found


@pytest.mark.parametrize("mode", ["flush", "round up"])
def test_the_bits_dont_depend_on_the_threads_mode(ranks: Ranks, shm: Path, mode: str) -> None:
    plain, _ = ranks.run(sum_in_another_mode, "as it is", path=[[shm]] * 2)
    first, second = ranks.run(sum_in_another_mode, mode, path=[[shm]] * 2)
    if not second:
        pytest.skip("this processor can't flush subnormals")
    assert first == second == plain
    # The smallest sum is half the smallest normal number: subnormal, and not 0.
    assert all(bits[0] > 0 for bits in plain.values())


def recover_after_a_time_out(absent: int) -> dict[str, object]:
    """One rank makes no call; the others' waits end by their deadline, and all recover."""
    backend = comm.get_backend()  # by name, no other would take its place
    assert backend.name == "shm"
    x = torch.arange(1000)
    if dist.get_rank() != absent:
        with pytest.raises(comm.CommError):
            backend.all_reduce(x)
    comm.recover()
    candidate = backend.decision.candidate("shm")
    assert candidate is not None
    found = {"name": backend.name, "verdict": candidate.verdict, "reason": candidate.reason}
    found["right"] = torch.equal(backend.all_reduce(x), dist.get_world_size() * x)
    comm.close()
    found["again"] = comm.get_backend().name
    comm.close()
    return found


@pytest.mark.parametrize(("world_size", "absent"), [(2, 1), (3, 0)])
def test_ranks_recover_after_a_time_out(ranks: Ranks, shm: Path, world_size: int, absent: int) -> None:
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "2"}
    job: dict[str, object] = {"world_size": world_size, "path": [[shm]] * world_size, "env": env}
    for found in ranks.run(recover_after_a_time_out, absent, **job):
        assert (found["name"], found["verdict"], found["right"]) == ("torch_distributed", "failed", True)
        assert f"rank {absent}, process" in str(found["reason"])
        assert "didn't come within 2 s" in str(found["reason"])
        assert found["again"] == "shm"
