"""The buffers that the limits share: mapped on all ranks, or the first failed rank's reason on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from comm_bench.contenders import Absent, Job
from comm_bench.limits import _Limit
from comm_bench.shared import share_buffer
from comm_core._memory.cpu import CpuMemory

if TYPE_CHECKING:
    from harness import Ranks


@contextmanager
def joined() -> Iterator[Job]:
    job = Job(torch.device("cpu"))
    try:
        yield job
    finally:
        job.close()


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:comm_core")


def check_shared(job: Job) -> None:
    """Every rank writes into every buffer; closing a limit closes its buffer."""
    buffer = share_buffer(job, 5000)
    assert mapped() == job.world_size
    for address in buffer.addresses:
        CpuMemory().view(address, buffer.nbytes)[4999 - job.rank] = 1 + job.rank
    job.barrier()
    assert buffer.tensor[5000 - job.world_size : 5000].flip(0).tolist() == list(range(1, job.world_size + 1))
    for name in ("limit:push", "limit:pull"):
        _Limit(name, job, lambda _: None, buffer=buffer).close()
    assert mapped() == 0


def shared() -> None:
    with joined() as job:
        check_shared(job)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_writes_into_every_buffer(ranks: Ranks, world_size: int) -> None:
    ranks.run(shared, world_size=world_size)


def failing(method: str, failing_ranks: tuple[int, ...]) -> str:
    def refuse(*_: Any) -> None:
        raise OSError("no more of it today")

    with joined() as job:
        patch = mock.patch.object(
            CpuMemory, method, refuse if job.rank in failing_ranks else getattr(CpuMemory, method)
        )
        with patch, pytest.raises(Absent) as caught:
            job.run_collectively(lambda: share_buffer(job, 5000))
        assert mapped() == 0
        check_shared(job)  # the ranks' exchanges are still in step
    return str(caught.value)


@pytest.mark.parametrize("failing_ranks", [(1,), (1, 2)])
@pytest.mark.parametrize("method", ["granularity", "reserve", "create", "export", "import_", "map"])
def test_a_rank_that_fails_anywhere_gives_its_reason_to_all(
    ranks: Ranks, method: str, failing_ranks: tuple[int, ...]
) -> None:
    texts = ranks.run(failing, method, failing_ranks, world_size=3)
    assert texts == ["rank 0: no shared memory: rank 1: OSError: no more of it today"] * 3


def refused(nbytes: int) -> str:
    with joined() as job, pytest.raises(Absent) as caught:
        share_buffer(job, nbytes << job.rank)
    return str(caught.value)


def test_what_all_ranks_refuse_has_the_first_ranks_reason(ranks: Ranks) -> None:
    texts = ranks.run(refused, 4096)
    reason = "ValueError: the ranks asked for buffers of different sizes, in bytes by rank: [4096, 8192]"
    assert texts == [f"no shared memory: rank 0: {reason}"] * 2
