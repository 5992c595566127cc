"""What ranks do in conformance tests of captures and of the fused operation; see `cases`.

A group on GPUs records CUDA graphs. On CPUs there are none: calls inside `comm.capture()` run at once.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._testing.handles import (
    FusedCall,
    check_sum,
    eager_cells,
    first_call,
    fused_cells,
    graph_calls,
    open_handle,
    synchronize,
)

__all__ = ["a_capture_fails_on_one_rank", "captured_calls_are_replayed", "fused_calls_are_right"]


def captured_calls_are_replayed(name: str) -> None:
    """Warm-ups inside `comm.capture()`, then graphs of several sizes, replayed with other data; twice."""
    with open_handle(name) as backend:
        comm.pre_capture_init(max_tokens=64, hidden_size=1024, dtype=torch.bfloat16)
        for capture in range(2):
            graphs = []
            with comm.capture():
                warm_up = first_call(name, backend)
                warm_up.check_results(warm_up(), "a warm-up inside comm.capture()")
                for device, dtype, sizes in eager_cells(backend, name, 1 << 16):
                    check_sum(backend, device, dtype, sizes[-1], "a warm-up inside comm.capture()")
                for call in graph_calls(backend, name):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        result = call()
                    graphs.append((graph, call, result))
            for replay in range(4):
                for graph, call, result in graphs:
                    call.fill(replay)
                    graph.replay()
                    call.check_results(result, f"replay {replay} in capture {capture}")
                synchronize(backend)
                if replay == 0 and graphs:  # the first replay may upload what the driver needs
                    free = torch.cuda.mem_get_info(backend.device)[0]
            assert not graphs or torch.cuda.mem_get_info(backend.device)[0] >= free, "a replay took GPU memory"
            backend.check()
            del graphs[:]


def a_capture_fails_on_one_rank(name: str) -> None:
    """The last rank's capture ends by an error of its own; the next capture, and calls, are right on all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with open_handle(name) as backend:
        eager = first_call(name, backend)
        for failing in (True, False):
            graph = None
            try:
                with comm.capture():
                    eager.check_results(eager(), "inside a capture")
                    for call in itertools.islice(graph_calls(backend, name), 1):
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            call()
                    if failing and rank == world_size - 1:
                        raise ZeroDivisionError("a fault of the caller's")
            except ZeroDivisionError:
                assert failing, "an error of an earlier capture came back"
            except comm.CaptureError as error:
                assert failing, f"the capture after a failed one failed: {error}"
                assert rank != world_size - 1, f"the caller's own error was replaced: {error}"
            del graph
            eager.check_results(eager(), "after a capture")


def fused_calls_are_right(name: str) -> None:
    """Sum, residual and RMS norm of every shape that the backend takes: out of place and in place."""
    checked = 0
    with open_handle(name) as backend:
        for route, shape in fused_cells(backend, name):
            FusedCall(backend, getattr(torch, route.dtype), shape).check_outputs()
            checked += 1
    assert checked, "the backend serves no fused call"
