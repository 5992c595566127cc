"""What ranks do in conformance tests of captures and of the fused operation; see `cases`.

A group on GPUs records CUDA graphs. On CPUs there are none: calls inside `comm.capture()` run at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._testing import inputs
from comm_core._testing.cases import check_sum, eager_cells, open_handle, synchronize
from comm_core._testing.inputs import make_integers, sizes_of, sum_exactly
from comm_core.types import Route

__all__ = ["a_capture_fails_on_one_rank", "captured_calls_are_replayed", "fused_calls_are_right"]

_EPS = 1e-6
# Rows and hidden sizes of the fused operation, as far as the backend's rules take them.
_TOKENS = (1, 2, 3, 7, 16, 65, 128, 129)
_HIDDEN = (1, 3, 8, 16, 24, 64, 128, 1000, 1024, 2880, 4096, 5120, 8192)


def _graph_cells(backend: comm.Backend, name: str) -> Iterator[tuple[torch.dtype, list[int]]]:
    """Yield the dtypes of which the backend serves captured messages, with sizes in elements."""
    for route in backend.decision.routes:
        if (route.op, route.mode, route.device_type) == ("all_reduce", "graph", "cuda"):
            dtype = getattr(torch, route.dtype)
            if sizes := sizes_of(route.rules, name, dtype.itemsize, inputs.SMALL_NBYTES):
                yield dtype, sizes


def captured_calls_are_replayed(name: str) -> None:
    """Warm-ups inside `comm.capture()`, then graphs of several sizes, replayed with other data; twice."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with open_handle(name) as backend:
        comm.pre_capture_init(max_tokens=64, hidden_size=1024, dtype=torch.bfloat16)
        for capture in range(2):
            graphs = []
            with comm.capture():
                for device, dtype, sizes in eager_cells(backend, name, 1 << 16):
                    check_sum(backend, device, dtype, sizes[-1], "a warm-up inside comm.capture()")
                for dtype, sizes in _graph_cells(backend, name):
                    for numel in sizes[:: max(1, len(sizes) // 3)]:
                        static = torch.zeros(numel, device=backend.device, dtype=dtype)
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            result = backend.all_reduce(static)
                        graphs.append((graph, static, result))
            for replay in range(4):
                for graph, static, result in graphs:
                    every = [
                        make_integers(r, world_size, static.numel(), static.dtype, replay) for r in range(world_size)
                    ]
                    static.copy_(every[rank])
                    graph.replay()
                    what = f"replay {replay} of {static.numel()} elements of {static.dtype} in capture {capture}"
                    assert torch.equal(result.cpu(), sum_exactly(every).to(result.dtype)), f"{what}: wrong sums"
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
        cells = list(itertools.islice(_graph_cells(backend, name), 1))
        for failing in (True, False):
            graph = None
            try:
                with comm.capture():
                    for device, dtype, numels in itertools.islice(eager_cells(backend, name, 1 << 16), 1):
                        check_sum(backend, device, dtype, numels[0], "inside a capture")
                    for dtype, numels in cells:
                        static = torch.ones(numels[-1], device=backend.device, dtype=dtype)
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            backend.all_reduce(static)
                    if failing and rank == world_size - 1:
                        raise ZeroDivisionError("a fault of the caller's")
            except ZeroDivisionError:
                assert failing, "an error of an earlier capture came back"
            except comm.CaptureError as error:
                assert failing, f"the capture after a failed one failed: {error}"
                assert rank != world_size - 1, f"the caller's own error was replaced: {error}"
            del graph
            for device, dtype, numels in itertools.islice(eager_cells(backend, name, 1 << 16), 1):
                check_sum(backend, device, dtype, numels[-1], "after a capture")


def fused_calls_are_right(name: str) -> None:
    """Sum, residual and RMS norm of every shape that the backend takes: out of place and in place."""
    checked = 0
    with open_handle(name) as backend:
        for route in backend.decision.routes:
            if (route.op, route.mode) == ("all_reduce_add_rms_norm", "eager"):
                for num_tokens, hidden_size in _shapes(route, name):
                    _check_fused(backend, route, num_tokens, hidden_size)
                    checked += 1
    assert checked, "the backend serves no fused call"


def _shapes(route: Route, name: str) -> list[tuple[int, int]]:
    itemsize = getattr(torch, route.dtype).itemsize
    edges = {rule.max_tokens for rule in route.rules if rule.max_tokens}
    multiples = {rule.hidden_multiple * factor for rule in route.rules for factor in (1, 3, 5)}
    shapes = itertools.product(sorted({*_TOKENS, *edges}), sorted({*_HIDDEN, *multiples}))
    found = [
        (tokens, hidden)
        for tokens, hidden in shapes
        if tokens * hidden * itemsize <= inputs.SMALL_NBYTES
        and route.backend_for(tokens * hidden * itemsize, tokens, hidden) == name
    ]
    return found[:: max(1, len(found) // 24)]


def _check_fused(backend: comm.Backend, route: Route, num_tokens: int, hidden_size: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype: torch.dtype = getattr(torch, route.dtype)
    shape = (num_tokens, hidden_size)
    what = f"the fused operation of {list(shape)} of {dtype}"
    # The last "rank" is the residual.
    *every, residual = [
        make_integers(r, world_size + 1, num_tokens * hidden_size, dtype).view(shape) for r in range(world_size + 1)
    ]
    weight = (torch.arange(hidden_size) % 3 + 1).to(dtype)
    total = sum_exactly([*every, residual])
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + _EPS) * (weight.double() + 1)
    # Two roundings to the dtype, or the error of float32.
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
    for in_place in (False, True):
        mine, theirs, scale = (t.to(backend.device, copy=True) for t in (every[rank], residual, weight))
        outputs = {"out": mine, "residual_out": theirs} if in_place else {}
        result, summed = backend.all_reduce_add_rms_norm(mine, theirs, scale, _EPS, 1.0, **outputs)
        assert torch.equal(summed.cpu(), total.to(dtype)), f"{what}: the sum with the residual is wrong"
        near = torch.allclose(result.cpu().double(), normed, rtol=tolerance, atol=tolerance)
        assert near, f"{what}: the norm is wrong"
        if in_place:
            assert result is mine, f"{what}: `out` isn't returned"
            assert summed is theirs, f"{what}: `residual_out` isn't returned"
        else:
            kept = torch.equal(mine.cpu(), every[rank]) and torch.equal(theirs.cpu(), residual)
            assert kept, f"{what}: an input changed"
        assert torch.equal(scale.cpu(), weight), f"{what}: the weight changed"
