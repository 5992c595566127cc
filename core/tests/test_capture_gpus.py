"""`comm.capture()` around real captures: two groups over the same GPUs, each rank's data registered before a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from handle_ranks import Outcome, outcome
from harness import Ranks, install

pytestmark = pytest.mark.gpus(2)
GPUS = "cpu:gloo,cuda:nccl"

# A backend whose captured calls read a number that the ranks only agree on when the capture is left: what it records is
# wrong for ever if a graph is replayed without its registration, or with another capture's.
PLUGIN = """
import contextlib

import torch, torch.distributed as dist
import comm_core as comm

class Session:
    def __init__(self, context):
        self.context = context
        self.rows = torch.zeros(4096, device=context.device)
        self.used = 0
        self.recorded = []

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        return comm.Available(300, (comm.Range("all_reduce", dtypes=("float32",), device_types=("cuda",)),))

    @comm.hookimpl
    def connect(self, topology, context):
        return Session(context)

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        out = tensor.clone() if out is None else out if out is tensor else out.copy_(tensor)
        dist.all_reduce(out, group=session.context.group)
        if torch.cuda.is_current_stream_capturing() and session.open:
            session.recorded.append(session.used)
            out.mul_(session.rows[session.used])
            session.used += 1
        return out

    @comm.hookimpl
    @contextlib.contextmanager
    def capture_ctx(self, session):
        session.open = True
        try:
            yield
            recorded, session.recorded = session.recorded, []
            if recorded:
                gathered = session.context.control.all_gather(recorded)
                assert gathered == [recorded] * session.context.world_size
                session.rows[recorded[0] : recorded[-1] + 1] = 1
        finally:
            session.open = False
            session.recorded.clear()

plugin = Plugin()
Session.open = False
"""


def layers(handles: list[comm.Backend], x: torch.Tensor) -> torch.Tensor:
    """Layers whose all-reduces alternate between the handles, as those of attention and experts do."""
    for number in range(6):
        x = handles[number % len(handles)].all_reduce(x + number) / dist.get_world_size()
    return x


def expected(x: torch.Tensor) -> torch.Tensor:
    """What `layers` makes of the mean of `x` over the ranks."""
    return x + sum(range(6))


def recorded(handles: list[comm.Backend], static: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers(handles, static)
    return graph, y


def replays() -> dict[str, Any]:
    """Entering all groups, entering none, failing inside, and capturing again."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tp, moe = dist.group.WORLD, dist.new_group(range(size), backend=GPUS)
    handles = [comm.get_backend(tp), comm.get_backend(moe)]
    static = torch.zeros(16, 1024, device="cuda")
    layers(handles, static)
    torch.cuda.synchronize()

    def fail() -> None:
        with comm.capture():
            recorded(handles, static)
            if rank == 1:
                raise ZeroDivisionError("my own")

    failed = outcome(fail)
    with comm.capture():
        layers(handles, static)  # a warm-up runs at once
        inside = recorded(handles, static)
    outside = recorded(handles, static)
    wrong = 0
    for step in range(200):
        data = torch.randint(0, 100, static.shape, device="cuda").float()
        dist.broadcast(data, 0)
        static.copy_(data + rank)
        mean = data + sum(range(size)) / size
        for graph, y in (inside, outside)[:: 1 if step % 2 else -1]:
            graph.replay()
            wrong += not torch.equal(y, expected(mean))
        if step % 7 == 0:
            wrong += not torch.equal(layers(handles, static), expected(mean))
    # Before the groups: NCCL destroys a communicator only after all graphs with its calls.
    del inside, outside, graph, y
    comm.close()
    return {"failed": failed, "wrong": wrong}


def test_two_groups_over_the_same_gpus(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path, "registers", PLUGIN)
    first, second = ranks.run(replays, backend=GPUS, path=[[folder]] * 2, deadline_s=240)
    assert first["failed"][0] == "CaptureError"
    assert "rank 1 failed: ZeroDivisionError: my own" in first["failed"][1]
    assert second["failed"] == ("ZeroDivisionError", "my own")
    assert first["wrong"] == second["wrong"] == 0


def first_call_in_a_graph() -> tuple[Outcome, Outcome, bool]:
    """A group whose NCCL communicator isn't there yet: a capture can't make it."""
    group = dist.new_group(range(dist.get_world_size()), backend="nccl")
    handle = comm.get_backend(group)
    static = torch.ones(8, device="cuda")
    # What torch binds to a device gets its communicator at once.
    handle._serving.terminal[1]._has_communicator = False
    first = outcome(lambda: recorded([handle], static) and None)
    torch.cuda.synchronize()
    comm.pre_capture_init(max_tokens=8, hidden_size=16, dtype=torch.float32)
    graphs: list[tuple[torch.cuda.CUDAGraph, torch.Tensor]] = []
    then = outcome(lambda: graphs.append(recorded([handle], static)))
    graphs[0][0].replay()
    return first, then, torch.equal(graphs[0][1], expected(static))


def test_a_first_call_of_nccl_isnt_captured(ranks: Ranks) -> None:
    for first, then, right in ranks.run(first_call_in_a_graph, backend=GPUS):
        assert first[0] == "CaptureError"
        assert "Call comm.pre_capture_init, or reduce a CUDA tensor of any size, before the capture" in first[1]
        assert then == ("ok", "None")
        assert right


def counted() -> list[dict[str, int]]:
    """The calls by mode before a capture, after it, and after replays."""
    handle = comm.get_backend()
    static = torch.ones(8, device="cuda")
    found = []

    def count() -> None:
        modes = {"eager": 0, "graph": 0}
        for item in handle.stats():
            modes[item.mode] += item.calls
        found.append(modes)

    layers([handle], static)
    count()
    with comm.capture():
        graph, y = recorded([handle], static)
    count()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    count()
    del graph, y
    comm.close()
    return found


def test_captured_calls_count_once_and_replays_do_not(ranks: Ranks) -> None:
    for found in ranks.run(counted, backend=GPUS):
        assert found == [{"eager": 6, "graph": 0}, {"eager": 6, "graph": 6}, {"eager": 6, "graph": 6}]
