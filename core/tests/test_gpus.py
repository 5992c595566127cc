"""Real GPUs: agreement, admission and captured graphs, with NCCL at the end of every route."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"

# A backend over NCCL that a test can make fail, by a mark in its source.
PLUGIN = """
import torch, torch.distributed as dist
import comm_core as comm

FAULT = {fault!r}

class Session:
    def __init__(self, context):
        self.context = context
        self.recording = False
        self.buffer = torch.empty(1 << 20, device=context.device)
        self.memory_nbytes = self.buffer.nbytes

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        link = topology.link(0, 1)
        ranges = [comm.Range("all_reduce", dtypes=("float32", "bfloat16"), device_types=("cuda",), max_nbytes=1 << 20)]
        return comm.Available(300, tuple(ranges)) if link.p2p else comm.Unavailable(link.reason)

    @comm.hookimpl
    def connect(self, topology, context):
        if FAULT == "connect" and context.rank == 1:
            raise RuntimeError("no peer memory today")
        context.control.barrier()
        assert torch.cuda.current_device() == context.device.index
        return Session(context)

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        out = tensor.clone() if out is None else out if out is tensor else out.copy_(tensor)
        dist.all_reduce(out, group=session.context.group)
        capturing = torch.cuda.is_current_stream_capturing()
        if session.context.rank == 1 and FAULT == ("graph" if capturing else "eager"):
            out.view(-1)[-1] += 1
        return out

plugin = Plugin()
"""


def check_sums(backend: comm.Backend) -> None:
    """Integers of every dtype and several shapes, out of place, in place, on the GPU and on the CPU."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for device in ("cuda", "cpu"):
        for dtype in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.int64,
            torch.int16,
            torch.uint8,
            torch.complex64,
        ):
            for shape in ((1,), (3, 5), (64, 1024), (0,)):
                base = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape) % 13
                total = sum(base * (r + 1) for r in range(world_size)).to(dtype)
                x = (base * (rank + 1)).to(dtype)
                assert torch.equal(backend.all_reduce(x), total)
                assert backend.all_reduce(x, out=x) is x
                assert torch.equal(x, total)
        x = torch.full((8, 6), rank, device=device).t()
        assert torch.equal(backend.all_reduce(x), torch.full_like(x, sum(range(world_size))))


def check_replays(backend: comm.Backend, around: AbstractContextManager[Any]) -> None:
    """Three calls recorded into one graph, between other kernels, replayed with fresh data.

    Args:
        backend: the handle.
        around: what the capture is in.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    static = torch.zeros(8, 4096, device="cuda")
    backend.all_reduce(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with around, torch.cuda.graph(graph):
        y = backend.all_reduce(static + 1)
        z = backend.all_reduce(y * 2)
        backend.all_reduce(z, out=z)
    for step in range(20):
        static.fill_(step + rank)
        graph.replay()
        first = sum(step + r + 1 for r in range(world_size))
        assert torch.equal(y, torch.full_like(y, first))
        assert torch.equal(z, torch.full_like(z, first * 2 * world_size * world_size))


def fallback_alone() -> dict[str, Any]:
    backend = comm.get_backend()
    check_sums(backend)
    check_replays(backend, contextlib.nullcontext())
    check_replays(backend, comm.capture())
    wrong = []
    with pytest.raises(ValueError, match="can't be reduced"):
        backend.all_reduce(torch.ones(2, device=torch.device("cuda", 1 - dist.get_rank())))
    group = dist.new_group([0, 1], backend="nccl")
    second = comm.get_backend(group)
    with pytest.raises(ValueError, match="cpu:gloo,cuda:nccl"):
        second.all_reduce(torch.ones(2))
    third = dist.new_group([0, 1], backend="nccl")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            comm.get_backend(third)
    except comm.CaptureError as error:
        wrong.append(str(error))
    comm.close()
    return {"name": backend.name, "capture": wrong, "topology": backend.topology.to_json()}


def test_nccl_at_the_end_of_the_route_eager_and_captured(ranks: Ranks) -> None:
    results = ranks.run(fallback_alone, backend=GPUS)
    for result in results:
        assert result["name"] == "torch_distributed"
        assert "Call comm.get_backend(group) before the capture" in result["capture"][0]
        assert result["topology"] == results[0]["topology"]
    topology = comm.Topology.from_json(results[0]["topology"])
    devices = [info.device for info in topology.ranks]
    assert all(device is not None and device.type == "cuda" for device in devices)
    assert topology.one_host


def negotiated(replays: bool) -> dict[str, Any]:
    before = torch.cuda.memory_allocated()
    backend = comm.get_backend()
    check_sums(backend)
    # Inside comm.capture() the routes of graphs count, which a backend that is wrong in graphs isn't on.
    check_replays(backend, comm.capture())
    if replays:
        check_replays(backend, contextlib.nullcontext())
    decision = backend.decision
    comm.close()
    del backend
    torch.cuda.synchronize()
    again = comm.get_backend()
    check_sums(again)
    comm.close()
    return {
        "decision": decision.to_json(),
        "name": again.name,
        "leaked": torch.cuda.memory_allocated() - before > 1 << 20,
    }


@pytest.mark.parametrize(
    ("fault", "verdict", "graph"),
    [
        (None, "serves", "mine"),
        ("connect", "failed", "torch_distributed"),
        ("eager", "serves", "mine"),
        ("graph", "serves", "torch_distributed"),
    ],
)
def test_a_backend_on_gpus_is_admitted_eager_and_captured(
    ranks: Ranks, tmp_path: Path, fault: str | None, verdict: str, graph: str
) -> None:
    folder = install(tmp_path, "mine", PLUGIN.format(fault=fault))
    # Outside comm.capture() a graph records the eager plan, whose backend is wrong in graphs where the fault is that.
    results = ranks.run(negotiated, fault != "graph", backend=GPUS, path=[[folder]] * 2)
    assert results[0] == results[1]
    assert not results[0]["leaked"]
    decision = results[0]["decision"]
    mine = next(c for c in decision["candidates"] if c["name"] == "mine")
    assert mine["verdict"] == verdict, mine
    if fault is not None:
        assert "no peer memory today" in mine["reason"] or "wrong sums" in mine["reason"]
        assert mine["rank"] == 1 or "on rank 1" in mine["reason"]
    serving = {
        route["mode"]: route["rules"][0]["backend"]
        for route in decision["routes"]
        if (route["op"], route["device_type"], route["dtype"]) == ("all_reduce", "cuda", "bfloat16")
    }
    eager = "torch_distributed" if fault in ("connect", "eager") else "mine"
    assert serving == {"eager": eager, "graph": graph}


def test_the_demo_sums_on_gpus() -> None:
    command = [sys.executable, "-m", "comm_core", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "one host" in done.stdout
    assert "CPU tensors" not in done.stdout
    _, _, rest = done.stdout.partition("#wrong")  # whichever backend serves
    table, _, _ = rest.partition("\n\n")
    rows = [line.split() for line in table.splitlines() if "KiB" in line]
    assert rows
    assert all(row[-1] == "0" for row in rows), done.stdout
