"""Functions that run in each rank on GPUs, with the stand-in for SGLang or its own parts."""

from __future__ import annotations

import importlib
from typing import Any

import engine_graphs
import torch
from sglang_ranks import FUSION, load, make_group, prepare, run_cuda_hooks


def integers(step: int, numel: int, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's whole numbers in a step, and their exact sum over the group, in bfloat16 on its device."""
    base = (torch.arange(numel, device=group.device) + step).remainder(8)
    tensors = [(base * (peer + 1)).remainder(16) for peer in range(group.world_size)]
    return tensors[group.rank_in_group].bfloat16(), torch.stack(tensors).sum(0).bfloat16()


def decode(hidden_size: int, batches: list[int]) -> dict[str, Any]:
    """Sum eagerly and in captured graphs, one a batch, in a group that SGLang enters and in one that it doesn't."""
    load()
    group, experts = make_group("tp"), make_group("moe_tp", custom=False)
    run_cuda_hooks(group)
    for numel in (1, 512, 8192, 1 << 20, (8 << 20) + 8):
        tensor, expected = integers(0, numel, group)
        torch.testing.assert_close(group.all_reduce(tensor), expected, rtol=0, atol=0)
    prepare(hidden_size)
    graphs = {}
    with group.graph_capture() as context:
        for batch in batches:
            static = torch.zeros(batch, hidden_size, dtype=torch.bfloat16, device=group.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=context.stream):
                outputs = [one.all_reduce(static + layer) for layer, one in enumerate((group, experts, group))]
            graphs[batch] = graph, static, outputs
    for step in range(20):
        for batch, (graph, static, outputs) in graphs.items():
            tensor, expected = integers(step, batch * hidden_size, group)
            static.copy_(tensor.view_as(static))
            graph.replay()
            for layer, output in enumerate(outputs):
                torch.testing.assert_close(output.flatten(), expected + layer * group.world_size, rtol=0, atol=0)
        tensor, expected = integers(step, 3 * hidden_size, group)  # an eager step in between
        torch.testing.assert_close(group.all_reduce(tensor), expected, rtol=0, atol=0)
    found = {
        "backends": [one.ca_comm.handle.name for one in (group, experts)],
        "stock": [base.__name__ for base in type(group.ca_comm).__mro__][1:-1],
    }
    graphs.clear()
    del graph, outputs
    torch.cuda.synchronize()
    experts.destroy()
    group.destroy()
    return found


def fuse_in_graph(hidden_size: int, tokens: int) -> str:
    """Sum, add and normalise in a captured graph, by SGLang's fused operation; return its backend."""
    load()
    group = make_group("tp")
    run_cuda_hooks(group)
    fusion = importlib.import_module(FUSION)
    prepare(hidden_size)
    generator = torch.Generator().manual_seed(7)
    parts = torch.randn(group.world_size, tokens, hidden_size, generator=generator).bfloat16().to(group.device)
    residual = torch.randn(tokens, hidden_size, generator=generator).bfloat16().to(group.device)
    weight = torch.randn(hidden_size, generator=generator).bfloat16().to(group.device)
    static = torch.zeros_like(residual)
    graph = torch.cuda.CUDAGraph()
    with group.graph_capture() as context, torch.cuda.graph(graph, stream=context.stream):
        outputs = fusion.flashinfer_allreduce_residual_rmsnorm(
            input_tensor=static, residual=residual, weight=weight, eps=1e-5, use_attn_tp_group=True
        )
    static.copy_(parts[group.rank_in_group])
    graph.replay()
    added = parts.float().sum(0) + residual.float()
    expected = added * torch.rsqrt(added.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    torch.testing.assert_close(outputs[0].float(), expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(outputs[1].float(), added, rtol=0.01, atol=0.02)
    name = str(group.ca_comm.handle.name)
    torch.cuda.synchronize()
    del graph, outputs
    group.destroy()
    return name


def time_graphs(sizes: list[int], calls: int) -> tuple[str, dict[int, float]]:
    """Return what sums, and the time of an all-reduce in a captured graph, in us, by bytes: the best of 20 replays."""
    load()
    group = make_group("tp")
    best = engine_graphs.time_graphs(group, sizes, calls)
    name = type(group.ca_comm).__name__
    disabled = group.ca_comm is None or group.ca_comm.disabled
    group.destroy()
    return "none" if disabled else name, best
