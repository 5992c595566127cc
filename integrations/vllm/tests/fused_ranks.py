"""What each rank runs with the real vLLM: its pattern matcher with this package's pass, on CPUs, without an engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch._inductor.config as inductor
import torch.distributed as dist

HIDDEN_SIZE = 256


def start(model: str, dtype: str) -> Any:
    """Create vLLM's groups, with calls as operators as on CUDA; return its configuration."""
    os.environ["VLLM_DIST_IDENT"] = f"comm-vllm-{os.getppid()}"
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    platform: Any = type(current_platform)
    platform.use_custom_op_collectives = classmethod(lambda _cls: True)
    config = VllmConfig(
        model_config=ModelConfig(model, dtype=dtype, skip_tokenizer_init=True),
        parallel_config=ParallelConfig(tensor_parallel_size=dist.get_world_size()),
    )
    rank = dist.get_rank()
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(dist.get_world_size(), rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(dist.get_world_size(), 1)
    return config


def layers(gemma: bool, eps: float, weight: torch.Tensor, matrix: torch.Tensor) -> Any:
    """Return two layers' worth of sums and norms, the last without use of its residual."""
    import vllm.ir
    from vllm.distributed import tensor_model_parallel_all_reduce

    def norm(tensor: torch.Tensor, residual: torch.Tensor) -> Any:
        scale = weight.float() + 1.0 if gemma else weight
        return vllm.ir.ops.fused_add_rms_norm(tensor_model_parallel_all_reduce(tensor), residual, scale, eps)

    def forward(tensor: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        tensor, residual = norm(tensor @ matrix, residual)
        tensor, _ = norm(tensor @ matrix, residual)
        return tensor + 1

    return forward


def fuse(model: str, cases: list[tuple[str, bool, float]]) -> list[tuple[int, int, float]]:
    """Compile the layers for each case: dtype, Gemma's norms, epsilon.

    Returns:
        For each case: the matches, the handle's fused calls, and the greatest difference from the plain layers.
    """
    import vllm.ir
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config import set_current_vllm_config
    from vllm.config.utils import Range

    config = start(model, cases[0][0])
    from comm_vllm.passes import CommAllReduceFusionPass

    calls: list[int] = []
    stock = comm.Backend.all_reduce_add_rms_norm

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    comm.Backend.all_reduce_add_rms_norm = counted  # type: ignore[method-assign]
    found = []
    try:
        for name, gemma, eps in cases:
            dtype = getattr(torch, name)
            config.model_config.dtype = dtype
            generator = torch.Generator().manual_seed(0)
            weight, matrix, residual, tensor = (
                torch.rand(shape, generator=generator).to(dtype)
                for shape in ((HIDDEN_SIZE,), (HIDDEN_SIZE, HIDDEN_SIZE), (7, HIDDEN_SIZE), (7, HIDDEN_SIZE))
            )
            forward = layers(gemma, eps, weight, matrix / 16)
            with set_current_vllm_config(config), vllm.ir.enable_torch_wrap(True), pass_context(Range(1, 4096)):
                fusion = CommAllReduceFusionPass(config)
                expected = forward(tensor + dist.get_rank(), residual)
                settings = {"post_grad_custom_post_pass": fusion, "fx_graph_cache": False}
                calls.clear()
                with inductor.patch(enable_auto_functionalized_v2=False, **settings):
                    result = torch.compile(forward, fullgraph=True)(tensor + dist.get_rank(), residual)
            difference = (result.float() - expected.float()).abs().max().item()
            found.append((fusion.matched_count, len(calls), difference / expected.float().abs().max().item()))
            torch._dynamo.reset()
    finally:
        comm.Backend.all_reduce_add_rms_norm = stock  # type: ignore[method-assign]
    return found


def configure(model: str) -> tuple[list[str], list[str], list[str]]:
    """Return the passes that vLLM's manager makes: with this package's, without its fusion, and without a handle."""
    from vllm.compilation.passes import pass_manager
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_tp_group

    config = start(model, "float32")
    from comm_vllm.passes import CommPassManager

    class StockPass(pass_manager.NoOpEliminationPass):  # type: ignore[misc]
        """In the place of FlashInfer's, which vLLM imports on CUDA alone."""

    vars(pass_manager)["AllReduceFusionPass"] = StockPass
    config.compilation_config.pass_config.fuse_allreduce_rms = True
    communicator = get_tp_group().device_communicator

    def names() -> list[str]:
        manager = CommPassManager()
        with set_current_vllm_config(config):
            manager.configure(config)
        assert pass_manager.AllReduceFusionPass is StockPass
        return [
            type(one).__name__ for one in manager.passes if "Fusion" in type(one).__name__ or type(one) is StockPass
        ]

    ours = names()
    os.environ["COMM_VLLM_FUSED"] = "0"
    refused = names()
    del os.environ["COMM_VLLM_FUSED"]
    handle, communicator.handle = communicator.handle, None
    without = names()
    communicator.handle = handle
    return ours, refused, without


def make_model(folder: Path) -> None:
    """Write the configuration of a tiny model; nothing here reads weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=HIDDEN_SIZE, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
