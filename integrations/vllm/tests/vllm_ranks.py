"""Functions that run in each rank, with the stand-in for vLLM and real process groups over Gloo."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist

STAND_IN = Path(__file__).with_name("stand_in")


def forget() -> None:
    """Drop what is imported of this package and of vLLM: each test starts as a new process of vLLM does."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("comm_vllm", "vllm")]:
        del sys.modules[name]


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the lines that this package logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.comm_vllm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def make_group(name: str = "tp", *, plugin: bool = True) -> Any:
    """Create a group of vLLM, in a process that has called this package's entry point, or hasn't."""
    forget()
    if plugin:
        importlib.import_module("comm_vllm").register()
    return importlib.import_module("vllm.distributed.parallel_state").GroupCoordinator(name)


def total(numel: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's tensor and the sum over the ranks."""
    world_size = dist.get_world_size()
    base = torch.arange(numel).remainder(8)
    return (base + dist.get_rank()).to(dtype), (base * world_size + sum(range(world_size))).to(dtype)


def serve(name: str = "tp") -> dict[str, Any]:
    """All-reduce in a group; return what served it."""
    with logged() as lines:
        group = make_group(name)
    communicator = group.device_communicator
    served = []
    for numel in (1, 64, 4096, 100_003):
        tensor, expected = total(numel)
        result = group._all_reduce_out_place(tensor)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        served.append(result is tensor)
    kept = communicator.handle is not None
    found = {
        "class": type(communicator).__name__,
        "handle": kept,
        "backend": communicator.handle.name if kept else None,
        "deterministic": kept and communicator.handle.decision.deterministic,
        "in_place": all(served),
        "stock_calls": communicator.events.count("all_reduce"),
        "buffers": getattr(communicator, "buffers", None),
        "lines": lines,
    }
    group.destroy()
    return found | {"closed": communicator.handle is None, "destroyed": communicator.events[-1]}


def serve_without_plugin_on(rank: int, vote_s: float) -> tuple[str, list[str], int]:
    """All-reduce in a group in which one rank doesn't have this package."""
    forget()
    plugin = dist.get_rank() != rank
    if plugin:
        groups = importlib.import_module("comm_vllm.groups")
        groups.get_handle.__kwdefaults__["vote_s"] = vote_s
        importlib.import_module("comm_vllm").register()
    with logged() as lines:
        group = importlib.import_module("vllm.distributed.parallel_state").GroupCoordinator("tp")
    tensor, expected = total(1000)
    torch.testing.assert_close(group._all_reduce_out_place(tensor), expected, rtol=0, atol=0)
    return type(group.device_communicator).__name__, lines, group.device_communicator.events.count("all_reduce")


def serve_without_core_on(rank: int) -> tuple[bool, list[str]]:
    """All-reduce in a group in which comm_core can't be imported on one rank."""
    forget()
    hidden = sys.modules["comm_core"]
    if dist.get_rank() == rank:
        sys.modules["comm_core"] = None  # type: ignore[assignment]
    try:
        with logged() as lines:
            group = make_group()
    finally:
        sys.modules["comm_core"] = hidden
    tensor, expected = total(1000)
    torch.testing.assert_close(group._all_reduce_out_place(tensor), expected, rtol=0, atol=0)
    return group.device_communicator.handle is not None, lines


def keep_strides() -> tuple[int, ...]:
    """All-reduce a transposed tensor: compiled code expects the result to have its strides."""
    group = make_group()
    tensor, expected = total(12)
    result = group._all_reduce_out_place(tensor.view(3, 4).t())
    torch.testing.assert_close(result, expected.view(3, 4).t(), rtol=0, atol=0)
    assert result is not tensor
    return result.stride()


def capture(config_changes: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Enter the captures of several groups within each other, twice; return what core was asked, and by whom."""
    groups = [make_group(names[0])]
    groups += [importlib.import_module("vllm.distributed.parallel_state").GroupCoordinator(name) for name in names[1:]]
    points = [group.device_communicator.ca_comm for group in groups]
    config = importlib.import_module("vllm.config").VllmConfig(**config_changes)
    config.compilation_config.max_cudagraph_capture_size = 16
    config.model_config.dtype = torch.bfloat16
    events: list[str] = []
    real = comm.pre_capture_init, comm.capture

    def pre_capture_init(**shapes: Any) -> None:
        events.append(f"prepare {shapes['max_tokens']} {shapes['hidden_size']} {shapes['dtype']}")
        real[0](**shapes)

    @contextlib.contextmanager
    def core_capture() -> Iterator[None]:
        events.append("enter")
        with real[1]():
            yield
        events.append("leave")

    comm.pre_capture_init, comm.capture = pre_capture_init, core_capture
    try:
        for point in points:
            point._config = config
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                for point in points:
                    stack.enter_context(point.capture())
                events.append("captured")
    finally:
        comm.pre_capture_init, comm.capture = real
    return events


def capture_with_custom() -> tuple[list[str], bool, Any, bool]:
    """Enter the capture of a group whose stock object is kept."""
    group = make_group()
    communicator = group.device_communicator
    with group.graph_capture():
        pass
    tensor = torch.ones(3)
    gathered = communicator.ca_comm.custom_all_gather(tensor)
    return communicator.events, communicator.ca_comm.disabled, communicator.buffers, gathered is tensor


def fail_in_capture() -> list[str]:
    """Leave a capture by an exception, then enter another."""
    group = make_group()
    seen = []
    with contextlib.suppress(KeyError), group.graph_capture():
        raise KeyError
    with group.graph_capture():
        seen.append("captured")
    return seen


def sleep() -> list[str]:
    """Suspend and resume a group as vLLM's sleep does."""
    group = make_group()
    state = importlib.import_module("vllm.distributed.parallel_state")
    tensor, expected = total(100)
    state.suspend_device_comms()
    refused = ""
    try:
        group._all_reduce_out_place(tensor.clone())
    except comm.CommError as error:
        refused = str(error)
    state.resume_device_comms()
    torch.testing.assert_close(group._all_reduce_out_place(tensor), expected, rtol=0, atol=0)
    return [*group.device_communicator.events, "suspended" if "suspended" in refused else refused]


def compile_keys(fuse: bool) -> list[tuple[set[tuple[str, object]], str]]:
    """Return what groups of two engines, one after the other, add to the key of vLLM's compiled graphs.

    Returns:
        For each engine: the addition, and torch's name of the group. At last: the addition after both, and "".
    """
    forget()
    envs = importlib.import_module("vllm.envs")
    before = envs.compile_factors()
    importlib.import_module("comm_vllm").register()
    config = importlib.import_module("vllm.config")
    settings = config.VllmConfig()
    settings.compilation_config.pass_config.fuse_allreduce_rms = fuse

    def added() -> set[tuple[str, object]]:
        return set(envs.compile_factors().items()) - set(before.items())

    found = []
    for _ in range(2):
        with config.set_current_vllm_config(settings):
            group = importlib.import_module("vllm.distributed.parallel_state").GroupCoordinator("tp")
        found.append((added(), group.device_group.group_name))
        group.destroy()
    return [*found, (added(), "")]


def compile_call() -> list[str]:
    """Compile a call of a group, as vLLM does on CPUs; return the operators of the graph."""
    group = make_group()
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(tensor: torch.Tensor) -> torch.Tensor:
        return group._all_reduce_out_place(tensor * 1) + 1

    tensor, expected = total(64)
    result = torch.compile(layer, backend=backend, fullgraph=True)(tensor)
    torch.testing.assert_close(result, expected + 1, rtol=0, atol=0)
    torch._dynamo.reset()
    return names


def stateless() -> tuple[bool, int]:
    """Ask for a handle of a group that torch.distributed doesn't know."""
    forget()
    groups = importlib.import_module("comm_vllm.groups")
    group = dist.new_group(backend="gloo")
    dist.destroy_process_group(group)
    before = threading.active_count()
    return groups.get_handle("tp:0", group, group) is None, threading.active_count() - before


def destroyed_before() -> str:
    """Destroy the process groups before the communicator, as vLLM older than 0.30 does."""
    group = make_group()
    communicator = group.device_communicator
    dist.destroy_process_group(group.device_group)
    dist.destroy_process_group(group.cpu_group)
    communicator.destroy()
    return str(communicator.events[-1])
