"""The compiler pass that fuses an all-reduce with the residual and RMSNorm after it, by comm-core's fused operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._inductor import pattern_matcher
from vllm.compilation.passes import pass_manager
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_tp_group
from vllm.ir import ops as ir

from comm_vllm import compiled

__all__ = ["CommAllReduceFusionPass", "CommPassManager"]

# The values that vLLM's own pass knows. A pattern has its epsilon as a constant.
_EPSILONS = (1e-5, 1e-6)

_Fused = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


class CommPassManager(pass_manager.PostGradPassManager):  # type: ignore[misc]
    """vLLM's pass manager, with this package's fusion in place of FlashInfer's where the group has a handle."""

    def configure(self, config: Any) -> None:
        """Create the passes that `config` (`VllmConfig`) asks for, in vLLM's order."""
        communicator = get_tp_group().device_communicator
        if not compiled.fuses(config) or getattr(communicator, "handle", None) is None:
            super().configure(config)
            return
        # By the name under which vLLM creates it: FlashInfer's pass would allocate its workspaces.
        with mock.patch.object(pass_manager, "AllReduceFusionPass", CommAllReduceFusionPass, create=True):
            super().configure(config)


class CommAllReduceFusionPass(VllmPatternMatcherPass):  # type: ignore[misc]
    """Replaces all-reduce, residual and RMSNorm by `torch.ops.comm_core.all_reduce_add_rms_norm`.

    The first norm of a model, which has no residual, stays as it is, and so does a norm with quantised output.

    Args:
        config: vLLM's configuration (`VllmConfig`).
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._group_name: str = get_tp_group().device_communicator.handle.group_name
        self._patterns = pattern_matcher.PatternMatcherPass("comm_all_reduce_fusion_pass")
        self._register()
        self.dump_patterns(config, self._patterns)

    @enable_fake_mode  # type: ignore[untyped-decorator]
    def _register(self) -> None:
        for eps in _EPSILONS:
            for gemma in (False, True):
                pattern, replacement = _norm(eps, gemma=gemma), _fused(self._group_name, eps, gemma=gemma)
                self._register_pair(pattern, replacement)
                # The last norm of a graph, whose residual is unused.
                self._register_pair(_first(pattern), _first(replacement))
            # torch takes the patterns of another epsilon for duplicates.
            pattern_matcher._seen_patterns.clear()  # noqa: SLF001

    def _register_pair(self, pattern: _Fused, replacement: _Fused) -> None:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=self.model_dtype, device=self.device)

        example = [empty(5, 16), empty(5, 16), empty(16)]
        pattern_matcher.register_replacement(
            pattern, replacement, example, pattern_matcher.fwd_only, [self._patterns], extra_check=_is_supported
        )

    @VllmInductorPass.time_and_log  # type: ignore[untyped-decorator]
    def __call__(self, graph: torch.fx.Graph) -> None:
        """Replace every match in the graph."""
        self.matched_count = self._patterns.apply(graph)
        VllmPatternMatcherPass.match_table[self.pass_name] += self.matched_count

    def uuid(self) -> str:
        """Return the key of this pass in torch's cache of compiled graphs, which have the group's name."""
        return str(VllmInductorPass.hash_source(type(self), self._group_name))


def _norm(eps: float, *, gemma: bool) -> _Fused:
    """Return the function that a model computes; torch reads its parameters' names."""

    def pattern(residual: torch.Tensor, tensor: torch.Tensor, weight: torch.Tensor) -> Any:
        total = tensor_model_parallel_all_reduce(tensor)
        return ir.fused_add_rms_norm(total, residual, weight.float() + 1.0 if gemma else weight, eps)

    return pattern


def _fused(group_name: str, eps: float, *, gemma: bool) -> _Fused:
    """Return the function that replaces `_norm`."""

    def replacement(residual: torch.Tensor, tensor: torch.Tensor, weight: torch.Tensor) -> Any:
        offset = 1.0 if gemma else 0.0
        return torch.ops.comm_core.all_reduce_add_rms_norm(tensor, residual, weight, group_name, eps, offset)

    return replacement


def _first(function: _Fused) -> _Fused:
    def first(residual: torch.Tensor, tensor: torch.Tensor, weight: torch.Tensor) -> Any:
        return function(residual, tensor, weight)[0]

    return first


def _is_supported(match: pattern_matcher.Match) -> bool:
    """Return whether a match's operands are `[num_tokens, hidden_size]` and of one dtype, as the operator needs."""
    tensor, residual, weight = (match.kwargs[name].meta["val"] for name in ("tensor", "residual", "weight"))
    return bool(tensor.dim() == 2 and tensor.dtype == residual.dtype == weight.dtype)
