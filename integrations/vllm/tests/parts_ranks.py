"""What each rank runs with vLLM's own `GroupCoordinator` and communicators, of the parts that vllm_parts.py wrote."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import engine_graphs
import torch
import torch.distributed as dist
from vllm_ranks import forget, total

HIDDEN_SIZE = 1024
MAX_TOKENS = 64


def make_group(name: str = "tp", dtype: torch.dtype = torch.bfloat16) -> Any:
    """Create a group of the stand-in or of the real vLLM, whichever is on the path, by this package's entry point."""
    forget()
    importlib.import_module("comm_vllm").register()
    state = importlib.import_module("vllm.distributed.parallel_state")
    config = importlib.import_module("vllm.config")
    stand_in = "stand_in" in str(state.__file__)
    if stand_in:
        settings = config.VllmConfig()
        settings.model_config.dtype, settings.model_config.hidden_size = dtype, HIDDEN_SIZE
        settings.compilation_config.max_cudagraph_capture_size = MAX_TOKENS
    else:
        settings = config.VllmConfig(MAX_TOKENS, HIDDEN_SIZE, dtype)
    with config.set_current_vllm_config(settings):
        if stand_in:
            return state.GroupCoordinator(name)
        return state.GroupCoordinator(
            group_ranks=[[*range(dist.get_world_size())]],
            local_rank=dist.get_rank(),
            torch_distributed_backend="nccl" if torch.cuda.is_available() else "gloo",
            use_device_communicator=True,
            group_name=name,
        )


def serve_real(name: str) -> dict[str, Any]:
    """All-reduce in a real group on CPUs, sleep and wake where this release can, and destroy the group."""
    group = make_group(name)
    communicator = group.device_communicator
    found = {
        "class": type(communicator).__mro__[0].__name__,
        "stock": type(communicator).__mro__[2].__module__,
        "backend": communicator.handle and communicator.handle.name,
    }
    state = sys.modules["vllm.distributed.parallel_state"]
    for attempt in range(2):
        for numel in (1, 64, 100_003):
            tensor, expected = total(numel)
            torch.testing.assert_close(group.all_reduce(tensor), expected, rtol=0, atol=0)
        if attempt == 0 and hasattr(state, "suspend_device_comms"):
            state.suspend_device_comms()
            state.resume_device_comms()
            found["slept"] = True
    gathered = group.all_gather(torch.full((1, 2), float(dist.get_rank())), 0)
    found["gathered"] = gathered[:, 0].tolist()
    group.destroy()
    return found | {"closed": communicator.handle is None}


def integers(step: int, numel: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's whole numbers in a step, and their exact sum over the ranks."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    base = (torch.arange(numel, device=device) + step).remainder(8)
    tensors = [(base * (peer + 1)).remainder(16) for peer in range(world_size)]
    return tensors[rank].to(dtype), torch.stack(tensors).sum(0).to(dtype)


def describe(group: Any) -> dict[str, Any]:
    communicator = group.device_communicator
    handle = getattr(communicator, "handle", None)
    return {
        "communicator": type(communicator).__name__,
        "backend": handle and handle.name,
        "buffers": [
            name
            for name in ("fi_ar_comm", "symm_mem_comm", "fi_pcie_ipc_ar_comm")
            if getattr(communicator, name, None) is not None
        ],
    }


def decode(layers: int, batches: list[int]) -> dict[str, Any]:
    """Sum eagerly and in captured graphs, as vLLM decodes: one graph a batch, replayed with other inputs each step."""
    group = make_group()
    dtype, device = torch.bfloat16, group.device
    for numel in (1, 512, 8192, 1 << 20, (8 << 20) + 8):
        tensor, expected = integers(0, numel, dtype, device)
        torch.testing.assert_close(group.all_reduce(tensor), expected, rtol=0, atol=0)
    graphs = {}
    for _ in range(2):  # vLLM measures the graphs' memory first, and drops these
        graphs.clear()
        with group.graph_capture() as context:
            for batch in batches:
                static = torch.zeros(batch, HIDDEN_SIZE, dtype=dtype, device=device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=context.stream):
                    outputs = [group.all_reduce(static + layer) for layer in range(layers)]
                graphs[batch] = graph, static, outputs
    for step in range(20):
        for batch, (graph, static, outputs) in graphs.items():
            tensor, expected = integers(step, batch * HIDDEN_SIZE, dtype, device)
            static.copy_(tensor.view_as(static))
            graph.replay()
            for layer, output in enumerate(outputs):
                offset = layer * dist.get_world_size()
                torch.testing.assert_close(output.flatten(), expected + offset, rtol=0, atol=0)
        tensor, expected = integers(step, 3 * HIDDEN_SIZE, dtype, device)  # an eager step in between
        torch.testing.assert_close(group.all_reduce(tensor), expected, rtol=0, atol=0)
    found = describe(group)
    graphs.clear()
    del graph, outputs
    torch.cuda.synchronize()
    group.destroy()
    return found


def sleep_between_replays() -> bool:
    """Suspend and resume a group between two replays of one graph."""
    group = make_group()
    state = sys.modules["vllm.distributed.parallel_state"]
    static = torch.zeros(4, HIDDEN_SIZE, dtype=torch.bfloat16, device=group.device)
    graph = torch.cuda.CUDAGraph()
    with group.graph_capture() as context, torch.cuda.graph(graph, stream=context.stream):
        output = group.all_reduce(static)
    for step in range(2):
        tensor, expected = integers(step, static.numel(), torch.bfloat16, group.device)
        static.copy_(tensor.view_as(static))
        graph.replay()
        torch.testing.assert_close(output.flatten(), expected, rtol=0, atol=0)
        if step == 0:
            torch.cuda.synchronize()
            state.suspend_device_comms()
            state.resume_device_comms()
    torch.cuda.synchronize()
    del graph, output
    group.destroy()
    return True


def time_graphs(sizes: list[int], calls: int) -> dict[int, float]:
    """Return the time of an all-reduce in a captured graph, in microseconds, by bytes: the best of 20 replays."""
    group = make_group()
    best = engine_graphs.time_graphs(group, sizes, calls)
    group.destroy()
    return best
