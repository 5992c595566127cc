"""What ranks do in conformance tests of padded batches; see `cases`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._testing.handles import FUSED, eager_cells, fused_cells, open_handle, synchronize
from comm_core._testing.inputs import make_integers, sum_exactly

__all__ = ["padded_batches_are_summed"]

#: A call with other inputs and the number of real rows, its outputs, and what is right in them.
_Call = tuple[Callable[[comm.TokenCounts], Any], list[torch.Tensor], list[torch.Tensor]]


def padded_batches_are_summed(name: str) -> None:
    """The real rows of all kinds of message are right, whatever the other rows of inputs and outputs hold.

    The number changes between eager calls, and between replays of one graph; it may be beyond the rows. In groups that
    ask for a wire, too, since these calls don't take it.
    """
    with open_handle(name, wire="") as backend:
        _check_all(backend, name)
    with open_handle(name, wire="fp8") as backend:
        if any(rule.wire for route in backend.decision.routes for rule in route.rules):
            _check_all(backend, name)


def _check_all(backend: comm.Backend, name: str) -> None:
    checked = 0
    for rows, (call, outputs, rights) in _calls(backend, name):
        counts = comm.TokenCounts(rows, 0, 1, outputs[0].device)  # no rank has a share of its own
        call(counts)
        runs: list[Callable[[], object]] = [functools.partial(call, counts)]
        if outputs[0].is_cuda:
            graph = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph):
                call(counts)
            runs.append(graph.replay)
        for number in (rows, 1, rows - 1, 0, (rows + 1) // 2, -3, rows + 9, 1, rows):
            counts.total.fill_(number)
            for run in runs:
                for output in outputs:
                    output.fill_(77)
                run()
                real = min(max(number, 0), rows)
                for output, right in zip(outputs, rights, strict=True):
                    # Sums are exact; a norm's elements are rounded twice.
                    error = 0.0 if output is outputs[-1] else 0.02
                    near = torch.allclose(output[:real].cpu().double(), right[:real], rtol=error, atol=error)
                    assert near, f"{number} real rows of {list(output.shape)} of {output.dtype} are wrong"
        checked += 1
    synchronize(backend)
    assert checked, "the backend serves no message of several rows"


def _calls(backend: comm.Backend, name: str) -> Iterator[tuple[int, _Call]]:
    """Yield messages of several rows that the backend serves: the number of rows, and the call."""
    for device, dtype, sizes in eager_cells(backend, name):
        for numel in [size for size in sizes if size % 8 == 0 and size > 8][-1:]:
            yield 8, _sum(backend, device, dtype, numel)
    for route, shape in list(fused_cells(backend, name))[-1:]:
        if shape[0] > 1:
            yield shape[0], _fused(backend, getattr(torch, route.dtype), shape)


def _inputs(numel: int, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's message of integers, and the exact sum of all ranks'."""
    ranks = dist.get_world_size()
    every = [make_integers(rank, ranks, numel, dtype).view(shape) for rank in range(ranks)]
    return every[dist.get_rank()], sum_exactly(every).double()


def _sum(backend: comm.Backend, device: torch.device, dtype: torch.dtype, numel: int) -> _Call:
    mine, right = _inputs(numel, dtype, (8, numel // 8))
    x = mine.to(device)
    out = torch.empty_like(x)
    return lambda counts: backend.all_reduce(x, out, num_tokens=counts), [out], [right]


def _fused(backend: comm.Backend, dtype: torch.dtype, shape: tuple[int, int]) -> _Call:
    mine, right = _inputs(shape[0] * shape[1], dtype, shape)
    x, residual = mine.to(backend.device), torch.ones(shape, dtype=dtype, device=backend.device)
    weight = residual[0].clone()
    y, s = torch.empty_like(x), torch.empty_like(x)
    right = right + 1
    normed = right * torch.rsqrt(right.square().mean(-1, keepdim=True) + 1e-6)

    def call(counts: comm.TokenCounts) -> object:
        return getattr(backend, FUSED)(x, residual, weight, out=y, residual_out=s, num_tokens=counts)

    return call, [y, s], [normed, right]
