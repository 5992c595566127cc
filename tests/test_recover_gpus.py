"""`comm.recover` on two GPUs: a backend times out, another takes over, and graphs are captured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"
HIDDEN = 4096
NUMELS = (3, HIDDEN, 64 * HIDDEN)
REPLAYS = 20
# In seconds: the bound of a kernel's wait, and far more.
ENV = {"COMM_CORE_WAIT_TIMEOUT_S": "2", "COMM_CORE_CONTROL_TIMEOUT_S": "60", "COMM_CORE_CONNECT_TIMEOUT_S": "120"}


@pytest.fixture
def path(tmp_path: Path) -> list[list[Path]]:
    """Folders in which customar_v2 and customar_v1 are found by each of two ranks."""
    names = ("customar_v2", "customar_v1")
    return [[install(tmp_path / name, name, f"import comm_plugin_{name} as plugin\n") for name in names]] * 2


def integers(numel: int, rank: int, step: int) -> torch.Tensor:
    """Small integers, of which bfloat16 holds every sum exactly."""
    return ((torch.arange(numel, device="cuda") * 7 + 13 * rank + step) % 61).to(torch.bfloat16)


def expected(numel: int, step: int) -> torch.Tensor:
    return sum((integers(numel, rank, step) for rank in range(dist.get_world_size())), torch.zeros(1, device="cuda"))


def eager(backend: comm.Backend) -> int:
    """Check sums out of place and in place, and as operators; return how many."""
    checked = 0
    for step in range(20):
        for numel in NUMELS:
            x = integers(numel, dist.get_rank(), step)
            for y in (backend.all_reduce(x), torch.ops.comm_core.all_reduce(x, backend.group_name), x):
                if y is x:
                    backend.all_reduce(x, out=x)
                assert torch.equal(y.float(), expected(numel, step).float()), (backend.name, step, numel)
                checked += 1
    backend.check()
    return checked


class Captured:
    """A graph with sums of every size."""

    def __init__(self, backend: comm.Backend) -> None:
        self.inputs = [torch.zeros(numel, device="cuda", dtype=torch.bfloat16) for numel in NUMELS]
        self.graph = torch.cuda.CUDAGraph()
        comm.pre_capture_init(max_tokens=64, hidden_size=HIDDEN, dtype=torch.bfloat16)
        with comm.capture(), torch.cuda.graph(self.graph):
            self.results = [backend.all_reduce(x) for x in self.inputs]

    def replay(self, step: int) -> None:
        for x in self.inputs:
            x.copy_(integers(x.numel(), dist.get_rank(), step))
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
    backend = comm.get_backend()
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
        captured = Captured(backend)
        found["checked"].append((eager(backend), captured.check()))
        backend.check()
        graphs.append(captured)
    del graph
    graphs.clear()
    comm.close()
    return found


def test_backends_time_out_one_after_another_and_the_next_serves(ranks: Ranks, path: list[list[Path]]) -> None:
    # NCCL's watchdog would end the process for a rank that is late.
    env = ENV | {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    for found in ranks.run(recover_again_and_again, backend=GPUS, path=path, env=env, deadline_s=280):
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
        eager(backend)
        comm.close()
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    return free


def test_close_after_a_recovery_gives_the_memory_back(ranks: Ranks, path: list[list[Path]]) -> None:
    env = ENV | {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    for free in ranks.run(free_memory, backend=GPUS, path=path, env=env, deadline_s=280):
        assert free[-1] >= free[1] - (8 << 20), free
