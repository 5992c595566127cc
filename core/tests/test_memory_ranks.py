"""A backend over buffers that its ranks share, in real processes: served, suspended, and dropped on all ranks alike."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import DEAD, Ranks, install

NAME = "mine"
# Each rank's buffer holds its input; its peers read it there.
PLUGIN = """
import os, signal, time
import torch, torch.distributed as dist
import comm_core as comm
from comm_core import memory
from comm_core._memory.cpu import CpuMemory

FAULT = {fault!r}
NBYTES = 1 << 16

class Session:
    def __init__(self, context):
        self.context, self.group = context, context.group
        self.buffer = memory.share(NBYTES, context, self.initialize)
        self.memory_nbytes = self.buffer.nbytes

    def initialize(self, tensor):
        tensor.fill_(0xFF)
        if self.context.rank == 1 and FAULT == "raises":
            raise RuntimeError("no contents today")
        if self.context.rank == 1 and FAULT == "hangs":
            time.sleep(8)
        if self.context.rank == 1 and FAULT == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        return comm.Available(500, (comm.Range("all_reduce", dtypes=("float32",), max_nbytes=NBYTES),))

    @comm.hookimpl
    def connect(self, topology, context):
        return Session(context)

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        flat = tensor.reshape(-1)
        session.buffer.tensor[: flat.nbytes].view(torch.float32).copy_(flat)
        dist.barrier(group=session.group)
        views = [CpuMemory().view(address, flat.nbytes).view(torch.float32) for address in session.buffer.addresses]
        total = sum(views[1:], views[0].clone()).view(tensor.shape)
        dist.barrier(group=session.group)
        return total if out is None else out.copy_(total)

    @comm.hookimpl
    def suspend(self, session):
        session.buffer.suspend()

    @comm.hookimpl
    def resume(self, session):
        session.buffer.resume()

    @comm.hookimpl
    def close(self, session, orderly):
        session.buffer.close()

plugin = Plugin()
"""


def mapped() -> int:
    """The shared buffers that this process maps."""
    return Path("/proc/self/maps").read_text().count("memfd:comm_core")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def check_sums(backend: comm.Backend) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for numel in (1, 1000, 1 << 14):
        x = torch.full((numel,), float(rank + 1))
        assert torch.equal(backend.all_reduce(x), torch.full((numel,), world_size * (world_size + 1) / 2))


def serve() -> tuple[str, int, int]:
    backend = comm.get_backend()
    check_sums(backend)
    used = mapped()
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        os._exit(0)
    check_sums(backend)
    os.waitpid(child, 0)
    check_sums(backend)
    name = backend.name
    comm.close()
    return name, used, mapped()


def test_a_backend_serves_by_shared_buffers(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path / NAME, NAME, PLUGIN.format(fault=None))
    assert ranks.run(serve, world_size=3, path=[[folder]] * 3) == [(NAME, 3, 0)] * 3


def serve_often() -> tuple[int, int]:
    counts = []
    gc.collect()
    gc.freeze()  # the objects of earlier tests, which each collection below would look at
    for _ in range(16):
        check_sums(comm.get_backend())
        comm.close()
        gc.collect()  # torch's group holds its sockets until it is freed
        counts.append(open_files())
    gc.unfreeze()
    return counts[-1] - counts[4], mapped()


def test_many_handles_leave_neither_files_nor_mappings(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path / NAME, NAME, PLUGIN.format(fault=None))
    for more_files, used in ranks.run(serve_often, path=[[folder]] * 2, deadline_s=250):
        assert more_files <= 0
        assert used == 0


def fall_back() -> dict[str, Any]:
    backend = comm.get_backend(timeout_s=4)
    check_sums(backend)
    mine = next(candidate for candidate in backend.decision.candidates if candidate.name == NAME)
    deadline = time.monotonic() + 60
    while mapped() and time.monotonic() < deadline:  # a thread that hangs keeps its buffer until it ends
        time.sleep(0.1)
    left = mapped()
    comm.close()
    return {"verdict": mine.verdict, "reason": mine.reason, "mapped": left}


@pytest.mark.parametrize(("fault", "reason"), [("raises", "no contents today"), ("hangs", "connect of mine")])
def test_a_rank_that_cant_share_drops_the_backend_on_all_ranks(
    ranks: Ranks, tmp_path: Path, fault: str, reason: str
) -> None:
    folder = install(tmp_path / NAME, NAME, PLUGIN.format(fault=fault))
    results = ranks.run(fall_back, world_size=3, path=[[folder]] * 3)
    for result in results:
        assert (result["verdict"], result["mapped"]) == ("failed", 0)
        assert reason in result["reason"]


def lose_a_peer() -> str:
    try:
        comm.get_backend(timeout_s=4)
    except comm.CommError as error:
        return str(error)
    raise AssertionError("a rank was killed")


def test_a_rank_that_is_killed_ends_the_call_on_the_others(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path / NAME, NAME, PLUGIN.format(fault="killed"))
    results = ranks.run(lose_a_peer, world_size=3, path=[[folder]] * 3, dying=[1])
    assert results[1] == DEAD
    assert all("rank 1" in text for text in (results[0], results[2])), results
