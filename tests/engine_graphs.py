"""The time of all-reduces of a serving engine's groups in CUDA graphs; for the tests of the integrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["time_graphs"]


def time_graphs(group: Any, sizes: Sequence[int], calls: int) -> dict[int, float]:
    """Return the time of an all-reduce in a captured graph, in microseconds, by bytes: the best of 20 replays.

    Args:
        group: the engine's group, with `all_reduce`, `graph_capture` and `device`.
        sizes: the messages, in bytes.
        calls: the number of calls in a graph, each of which reads the result of the one before.
    """
    best = {}
    for nbytes in sizes:
        static = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device=group.device)
        group.all_reduce(static)  # what a first call of a size does isn't for a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with group.graph_capture() as context, torch.cuda.graph(graph, stream=context.stream):
            tensor = static
            for _ in range(calls):
                tensor = group.all_reduce(tensor)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        times = []
        for _ in range(20):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
        worst = torch.tensor([min(times)], device=group.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        best[nbytes] = worst.item()
        del graph, tensor
    torch.cuda.synchronize()
    return best
