"""Going on after a fault on two GPUs: with another backend, or in a new group without a killed rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import DEAD, Ranks, install, install_entry_point

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
HIDDEN = 4096
NUMELS = (3, HIDDEN, 64 * HIDDEN)
REPLAYS = 20
# In seconds: the bound of a kernel's wait, and far more. NCCL's watchdog would end the process for a rank that is late.
ENV = {"COMM_CORE_WAIT_TIMEOUT_S": "2", "COMM_CORE_CONTROL_TIMEOUT_S": "60", "COMM_CORE_CONNECT_TIMEOUT_S": "120"}
ENV |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
# `comm.recover` waits as long for a killed rank.
LOST = ENV | {"COMM_CORE_CONTROL_TIMEOUT_S": "20"}


@pytest.fixture
def path(tmp_path: Path) -> list[list[Path]]:
    """Folders in which customar_v2 and customar_v1 are found by each of two ranks."""
    names = ("customar_v2", "customar_v1")
    return [[install(tmp_path / name, name, f"import comm_plugin_{name} as plugin\n") for name in names]] * 2


def integers(numel: int, rank: int, step: int) -> torch.Tensor:
    """Small integers, of which bfloat16 holds every sum exactly."""
    return ((torch.arange(numel, device="cuda") * 7 + 13 * rank + step) % 61).to(torch.bfloat16)


def expected(numel: int, step: int) -> torch.Tensor:
    """The sum in a group of two ranks."""
    return sum((integers(numel, rank, step) for rank in range(2)), torch.zeros(1, device="cuda"))


def eager(backend: comm.Backend, rank: int) -> int:
    """Check sums out of place and in place, and as operators; return how many."""
    checked = 0
    for step in range(20):
        for numel in NUMELS:
            x = integers(numel, rank, step)
            for y in (backend.all_reduce(x), torch.ops.comm_core.all_reduce(x, backend.group_name), x):
                if y is x:
                    backend.all_reduce(x, out=x)
                assert torch.equal(y.float(), expected(numel, step).float()), (backend.name, step, numel)
                checked += 1
    backend.check()
    return checked


class Captured:
    """A graph with sums of every size."""

    def __init__(self, backend: comm.Backend, rank: int) -> None:
        self.rank = rank
        self.inputs = [torch.zeros(numel, device="cuda", dtype=torch.bfloat16) for numel in NUMELS]
        self.graph = torch.cuda.CUDAGraph()
        comm.pre_capture_init(max_tokens=64, hidden_size=HIDDEN, dtype=torch.bfloat16)
        with comm.capture(), torch.cuda.graph(self.graph):
            self.results = [backend.all_reduce(x) for x in self.inputs]

    def replay(self, step: int) -> None:
        for x in self.inputs:
            x.copy_(integers(x.numel(), self.rank, step))
        self.graph.replay()
        torch.cuda.synchronize()

    def check(self) -> int:
        for step in range(REPLAYS):
            self.replay(step)
            for x, y in zip(self.inputs, self.results, strict=True):
                assert torch.equal(y.float(), expected(x.numel(), step).float()), (step, x.numel())
        return REPLAYS * len(NUMELS)


def error_of(call: Any) -> str:
    try:
        call()
    except comm.CommError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def time_out(absent: int) -> str:
    """One rank makes no call, and the others' kernels give up; then all recover. Return the backend's name."""
    backend = comm.get_backend()
    failed = backend.name
    error = ""
    if dist.get_rank() != absent:
        backend.all_reduce(torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16))
        torch.cuda.synchronize()
        error = error_of(backend.check)
        assert f"rank {absent} didn't come within 2 s" in error, error
    comm.recover()
    candidate = backend.decision.candidate(failed)
    assert candidate is not None
    assert candidate.verdict == "failed", backend.explain()
    assert f"rank {absent} didn't come within 2 s" in candidate.reason
    assert candidate.rank != absent
    assert comm.get_backend() is backend
    return backend.name


def recover_again_and_again() -> dict[str, Any]:
    """Each backend times out in turn, down to torch.distributed; eager sums and new graphs are right after each."""
    backend, rank = comm.get_backend(), dist.get_rank()
    found: dict[str, Any] = {"names": [backend.name], "checked": [], "replayed": []}
    graphs = []
    for absent in (None, 1, 0):
        if absent is not None:
            found["names"].append(time_out(absent))
            # By mistake; the graphs of the same rank's memory must not crash, nor pass for right.
            for graph in graphs:
                graph.replay(0)
            for _ in graphs:  # each backend's session reports its own
                found["replayed"].append(error_of(backend.check))
            assert error_of(backend.check) == ""
        captured = Captured(backend, rank)
        found["checked"].append((eager(backend, rank), captured.check()))
        backend.check()
        graphs.append(captured)
    del graph
    graphs.clear()
    comm.close()
    return found


def test_backends_time_out_one_after_another_and_the_next_serves(ranks: Ranks, path: list[list[Path]]) -> None:
    for found in ranks.run(recover_again_and_again, backend=GPUS, path=path, env=ENV, deadline_s=280):
        assert found["names"] == ["customar_v2", "customar_v1", "torch_distributed"]
        assert found["checked"] == [(20 * 3 * len(NUMELS), REPLAYS * len(NUMELS))] * 3
        assert len(found["replayed"]) == 3
        for text in found["replayed"]:
            assert text.startswith("CommError: backend 'customar_v")
            assert "Graphs that were captured before comm.recover must not be replayed: capture them again" in text


def free_memory() -> list[int]:
    """Recover and close, time after time; the free memory after each."""
    free = []
    for _ in range(4):
        backend = comm.get_backend()
        time_out(1)
        eager(backend, dist.get_rank())
        comm.close()
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    return free


def test_close_after_a_recovery_gives_the_memory_back(ranks: Ranks, path: list[list[Path]]) -> None:
    for free in ranks.run(free_memory, backend=GPUS, path=path, env=ENV, deadline_s=280):
        assert free[-1] >= free[1] - (8 << 20), free


def lose_a_rank(name: str, in_a_replay: bool) -> dict[str, Any]:
    """Rank 1 of the group of ranks 0 and 1 is killed; rank 0 goes on with rank 2, which uses the same GPU as rank 1."""
    # Each rank is in equally many groups, by which torch names the survivors' group.
    pair, _ = dist.new_group([0, 1]), dist.new_group([2])
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    if rank != 2:
        backend = comm.get_backend(pair, backends=(name,))
        found["before"] = (backend.name, eager(backend, rank))
        captured = Captured(backend, rank)
        captured.check()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        # The first call may return before the end of the peer is noticed.
        for _ in range(1 if in_a_replay else 2):
            found["error"] = error_of(
                lambda: captured.replay(0) if in_a_replay else backend.all_reduce(captured.inputs[1])
            )
            torch.cuda.synchronize()
        found["error"] = found["error"] or error_of(backend.check)
        found["recover"] = error_of(lambda: comm.recover(pair))
        comm.close(pair)
    survivors = dist.new_group([0, 2], use_local_synchronization=True)
    backend = comm.get_backend(survivors, backends=(name,))
    found["name"] = backend.name
    found["checked"] = (eager(backend, rank // 2), Captured(backend, rank // 2).check())
    comm.close(survivors)
    return found


@pytest.mark.parametrize("in_a_replay", [False, True])
@pytest.mark.parametrize("name", ["customar_v2", "customar_v1", "nccl"])
def test_the_survivors_of_a_killed_rank_go_on(ranks: Ranks, tmp_path: Path, name: str, in_a_replay: bool) -> None:
    path = [[install_entry_point(tmp_path / "plugin", f"comm_plugin_{name}", name)]] * 3
    results = ranks.run(
        lose_a_rank,
        *(name, in_a_replay),
        world_size=3,
        backend=GPUS,
        devices=[0, 1, 1],
        path=path,
        env=LOST,
        dying=[1],
        deadline_s=280,
    )
    assert results[1] == DEAD
    assert results[0]["before"] == (name, 20 * 3 * len(NUMELS))
    assert results[0]["error"].startswith("CommTimeoutError"), results[0]
    assert "rank 1" in results[0]["error"]
    assert results[0]["recover"].startswith("CommTimeoutError"), results[0]
    assert "rank 1 didn't come in time" in results[0]["recover"]
    for survivor in (results[0], results[2]):
        assert survivor["name"] == name
        assert survivor["checked"] == (20 * 3 * len(NUMELS), REPLAYS * len(NUMELS))
