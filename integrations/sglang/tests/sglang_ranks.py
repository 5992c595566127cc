"""Functions that run in each rank on CPUs, with the stand-in for SGLang or its own parts, and real process groups."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core._probe import rank as probing

STAND_IN = Path(__file__).with_name("stand_in")
_STATE = "sglang.srt.distributed.parallel_state"
FUSION = "sglang.srt.layers.flashinfer_comm_fusion"


def write_metadata(folder: Path, release: str, *, plugin: bool = True) -> Path:
    """Write the metadata of SGLang, which has its release, and of this package, which has its entry points."""
    named = {"sglang": (release, "")}
    if plugin:
        named["comm_sglang"] = ("0.1.0", "[sglang.srt.plugins]\ncomm = comm_sglang:register\n")
    for name, (version, entries) in named.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entries)
    return folder


def forget() -> None:
    """Drop what is imported of this package and of the stand-in: each test starts as a new process of SGLang does."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("comm_sglang", "sglang")]:
        del sys.modules[name]


@contextlib.contextmanager
def logged(name: str = "sglang.comm_sglang") -> Iterator[list[str]]:
    """Collect the lines that a logger gets."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def load() -> None:
    """Start SGLang as a process of it does: load its plugins, which applies their hooks."""
    forget()
    importlib.import_module("sglang.srt.plugins").load_plugins()


def make_group(name: str = "tp", ranks: list[list[int]] | None = None, *, custom: bool = True) -> Any:
    """Create a group of SGLang; of all ranks by default."""
    on_gpus = torch.cuda.is_available()
    return importlib.import_module(_STATE).init_model_parallel_group(
        ranks or [[*range(dist.get_world_size())]],
        dist.get_rank(),
        "nccl" if on_gpus else "gloo",
        use_pynccl=on_gpus,
        use_custom_allreduce=custom,
        group_name=name,
    )


def total(numel: int, size: int | None = None, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's tensor and the sum over the group's ranks."""
    size = dist.get_world_size() if size is None else size
    rank = dist.get_rank() if rank is None else rank
    base = torch.arange(numel).remainder(8)
    return (base + rank).float(), (base * size + sum(range(size))).float()


def check_sums(group: Any, *, outplace: bool = True) -> None:
    """Check the sums that a group returns: of CPU tensors, in place, and by the way of CUDA tensors, out of place."""
    for numel in (1, 64, 100_003):
        tensor, expected = total(numel, group.world_size, group.rank_in_group)
        if outplace:
            before = tensor.clone()
            result = group._all_reduce_out_place(tensor, "ca")
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
            torch.testing.assert_close(tensor, before, rtol=0, atol=0)
        result = group.all_reduce(tensor)
        assert result is tensor
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def serve(name: str = "tp", custom: bool = True) -> dict[str, Any]:
    """All-reduce in a group; return what served it."""
    with logged() as lines:
        load()
        group = make_group(name, custom=custom)
    ours = group.ca_comm
    handle = getattr(ours, "handle", None)
    check_sums(group, outplace=ours is not None)
    with group.graph_capture():
        pass
    found = {
        "class": type(ours).__name__,
        "stock": [base.__name__ for base in type(ours).__mro__][1:-1],
        "backend": handle and handle.name,
        "deterministic": handle is not None and handle.decision.deterministic,
        "events": getattr(ours, "events", None),
        "lines": lines,
    }
    group.destroy()
    return found | {"closed": handle is not None and handle.failure is not None}


def serve_without_plugin_on(rank: int, vote_s: float) -> tuple[str, list[str]]:
    """All-reduce in a group in which SGLang hasn't loaded this package on one rank."""
    forget()
    if dist.get_rank() != rank:
        groups = importlib.import_module("comm_sglang.groups")
        groups.get_handle.__kwdefaults__["vote_s"] = vote_s
        importlib.import_module("sglang.srt.plugins").load_plugins()
    with logged() as lines:
        group = make_group()
    check_sums(group)
    return type(group.ca_comm).__name__, lines


def serve_without_core_on(rank: int) -> tuple[str, list[str]]:
    """All-reduce, and prepare a capture, where comm_core can't be imported on one rank."""
    load()
    hidden = sys.modules["comm_core"]
    if dist.get_rank() == rank:
        sys.modules["comm_core"] = None  # type: ignore[assignment]
    try:
        with logged() as lines:
            make_group("attention_tp", [[rank] for rank in range(dist.get_world_size())])
            group = make_group()
        run_cuda_hooks(group)
        prepare(64)
    finally:
        sys.modules["comm_core"] = hidden
    check_sums(group)
    return type(group.ca_comm).__name__, lines


def serve_where_a_hook_fails_on(rank: int) -> tuple[str, list[str]]:
    """All-reduce in a group in which SGLang can't apply one of this package's hooks on one rank."""
    forget()
    if dist.get_rank() == rank:
        del importlib.import_module(_STATE).GroupCoordinator.destroy
    with logged("sglang.srt.plugins.hook_registry"):
        importlib.import_module("sglang.srt.plugins").load_plugins()
    with logged() as lines:
        group = make_group()
    check_sums(group)
    return type(group.ca_comm).__name__, lines


def keep_strides() -> tuple[int, ...]:
    """All-reduce a transposed tensor: compiled code expects the result to have its strides."""
    load()
    group = make_group()
    tensor, expected = total(12)
    result = group._all_reduce_out_place(tensor.view(3, 4).t(), "ca")
    torch.testing.assert_close(result, expected.view(3, 4).t(), rtol=0, atol=0)
    return result.stride()


def run_cuda_hooks(group: Any) -> None:
    """Apply the hooks that this package has for ranks on GPUs, which a group on CPUs doesn't need."""
    hooks = importlib.import_module("comm_sglang.hooks")
    hooks.register(hooks.workers())
    registry = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
    registry.apply_hooks()
    assert hooks.unapplied(hooks.workers()) == []
    state, fusion = importlib.import_module(_STATE), importlib.import_module(FUSION)
    state._ATTN_TP = state._MOE_TP = state._MOE_EP = group
    if hasattr(fusion, "resolve_fusion_group"):  # SGLang's reads the settings of a server
        fusion.resolve_fusion_group = lambda **_which: (group.world_size, group.rank_in_group, group)


def prepare(hidden_size: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Do what SGLang's graph runner does before it captures."""
    module = importlib.import_module("comm_sglang.hooks").workers()[0].target.split(".")
    runner_class = getattr(importlib.import_module(".".join(module[:-2])), module[-2])
    model = SimpleNamespace(model_config=SimpleNamespace(hidden_size=hidden_size), dtype=dtype)
    runner = runner_class(model)
    for name, value in vars(model).items():
        setattr(runner, name, value)  # before SGLang 0.5.14 the model runner itself
    runner._pre_initialize_flashinfer_allreduce_workspace()


def compile_call() -> list[str]:
    """Compile a call of a group, as SGLang does on CPUs; return the operators of the graph."""
    load()
    group = make_group()
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(tensor: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = group.all_reduce(tensor * 1)
        return result + 1

    tensor, expected = total(64)
    result = torch.compile(layer, backend=backend, fullgraph=True)(tensor)
    torch.testing.assert_close(result, expected + 1, rtol=0, atol=0)
    torch._dynamo.reset()
    return names


# The five reports of all-reduces that went wrong.


def unavailable() -> dict[str, Any]:
    """Capture and all-reduce in a group for which the backend of highest priority is unavailable."""
    load()
    group = make_group()
    with group.graph_capture():
        check_sums(group)
    explained = group.ca_comm.handle.explain()
    v2 = importlib.import_module("sglang.srt.distributed.device_communicators.custom_all_reduce_v2").CustomAllReduceV2
    derived = importlib.import_module("comm_sglang.communicator").subclass_of(v2)(group, group.ca_comm.handle)
    with derived.capture():
        tensor, expected = total(100)
        torch.testing.assert_close(derived.custom_all_reduce(tensor), expected, rtol=0, atol=0)
    return {
        "backend": group.ca_comm.handle.name,
        "reason": "there is no NVLink" in explained,
        "is_v2": isinstance(derived, v2),
        "pushes": derived.supports_push(nbytes=16, num_blocks=1) or derived.has_multicast,
    }


def on_two_hosts(ranks: list[list[int]]) -> tuple[str, list[str]]:
    """All-reduce in a group of ranks, of which every two share a simulated host."""
    real = probing.host.probe_host

    def probe_host(*args: Any, **options: Any) -> Any:
        number = dist.get_rank() // 2
        return dataclasses.replace(real(*args, **options), id=f"host{number}", boot_id=f"boot{number}")

    probing.host.probe_host = probe_host
    try:
        load()
        with logged("comm_core") as lines:
            group = make_group("tp", ranks)
    finally:
        probing.host.probe_host = real
    check_sums(group)
    return group.ca_comm.handle.name, [line for line in lines if line.startswith("WARNING")]


def capture_unlisted() -> dict[str, Any]:
    """Capture in a group that SGLang enters, and sum in one that it doesn't."""
    load()
    listed, unlisted = make_group("tp"), make_group("moe_tp", custom=False)
    events: list[str] = sys.modules["recording"].events  # type: ignore[attr-defined]
    events.clear()
    with listed.graph_capture():
        check_sums(unlisted)
    sums = [event for event in events if event.startswith("sum")]
    return {"entered": events.count("enter"), "left": events.count("leave"), "sums": sorted({*sums})}


def fuse(ranks: list[list[int]]) -> dict[str, Any]:
    """Prepare, and all-reduce with a residual and a norm, in a part of the ranks."""
    load()
    group = make_group("attn_cp", ranks)
    run_cuda_hooks(group)
    fusion = importlib.import_module(FUSION)
    shapes: list[Any] = []
    real = comm.pre_capture_init
    comm.pre_capture_init = lambda **given: (shapes.append(given), real(**given))[1]
    try:
        prepare(64, torch.float32)
    finally:
        comm.pre_capture_init = real
    generator = torch.Generator().manual_seed(7)
    parts = torch.randn(group.world_size, 5, 64, generator=generator)
    residual, weight = torch.randn(5, 64, generator=generator), torch.randn(64, generator=generator)
    added = parts.sum(0) + residual
    expected = added * torch.rsqrt(added.square().mean(-1, keepdim=True) + 1e-5) * weight
    with group.graph_capture():
        result, new_residual = fusion.flashinfer_allreduce_residual_rmsnorm(
            input_tensor=parts[group.rank_in_group].clone(),
            residual=residual,
            weight=weight,
            eps=1e-5,
            max_token_num=2048,
            use_attn_tp_group=True,
        )
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(new_residual, added)
    # A norm's weight may have more bits than the activations; SGLang's own workspaces aren't there for it.
    short, weight = parts[group.rank_in_group].bfloat16(), weight + 0.001
    result, _ = fusion.flashinfer_allreduce_residual_rmsnorm(
        input_tensor=short, residual=residual.bfloat16(), weight=weight, eps=1e-5, use_attn_tp_group=True
    )
    torch.testing.assert_close(result, (expected / (weight - 0.001) * weight).bfloat16(), rtol=0.05, atol=0.05)
    return {
        "first": group.ranks[0],
        "prepared": [(one["max_tokens"], one["hidden_size"], str(one["dtype"])) for one in shapes],
        "workspaces": getattr(fusion, "workspaces", []),
    }


def memory_saver() -> list[str]:
    """Enter a capture of graphs that SGLang's memory saver moves."""
    load()
    group = make_group()
    events: list[str] = sys.modules["recording"].events  # type: ignore[attr-defined]
    events.clear()
    with group.graph_capture():
        pass
    return events


def fail_in_capture() -> list[str]:
    """Leave a capture by an exception, then enter another."""
    load()
    group = make_group()
    seen = []
    with contextlib.suppress(KeyError), group.graph_capture():
        raise KeyError
    with group.graph_capture():
        seen.append("captured")
    return seen
