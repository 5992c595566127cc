"""SGLang's fused all-reduces, residual and RMSNorm by the handles, and what they need before a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.distributed import parallel_state
from sglang.srt.layers import flashinfer_comm_fusion

from comm_sglang.communicator import CommAllReduce

if TYPE_CHECKING:
    import torch

__all__ = ["all_reduce_residual_rmsnorm", "prepare", "serves_every_group"]

#: The largest batch, in tokens, that SGLang fuses and prepares its own workspaces for, in every release.
MAX_TOKENS = 2048


def prepare(model_runner: Any) -> None:
    """Prepare every group's backends for the captures of a model. Collective over all groups.

    Args:
        model_runner: SGLang's `ModelRunner`, of the model or of a draft model.
    """
    import comm_core as comm

    comm.pre_capture_init(
        max_tokens=MAX_TOKENS, hidden_size=model_runner.model_config.hidden_size, dtype=model_runner.dtype
    )


def serves_every_group() -> bool:
    """Return whether the groups in which SGLang fuses all have handles, so that FlashInfer needs no workspaces."""
    groups = [_group(use_attn_tp_group=use) for use in (True, False)]
    return all(group.world_size == 1 or isinstance(group.ca_comm, CommAllReduce) for group in groups)


def all_reduce_residual_rmsnorm(
    original: Callable[..., Any],
    input_tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *args: Any,
    use_attn_tp_group: bool = True,
    **options: Any,
) -> Any:
    """Take the place of `flashinfer_allreduce_residual_rmsnorm`, which is `original`.

    Returns:
        The normalised sum and the new residual; `(None, None)` or tensors of `original` where the group has no handle.
        With a handle, `original` isn't asked: it would create its workspaces, together with the other ranks, perhaps
        while a stream captures.
    """
    ours = _group(use_attn_tp_group=use_attn_tp_group).ca_comm
    if not isinstance(ours, CommAllReduce) or args:  # SGLang passes none by position
        return original(input_tensor, residual, weight, eps, *args, use_attn_tp_group=use_attn_tp_group, **options)
    return ours.handle.all_reduce_add_rms_norm(input_tensor, residual, weight, eps)


def _group(*, use_attn_tp_group: bool) -> Any:
    """Return the group over which SGLang's fused operation sums: attention's, or the experts'."""
    resolve = getattr(flashinfer_comm_fusion, "resolve_fusion_group", None)
    if resolve is not None:
        return resolve(use_attn_tp_group=use_attn_tp_group)[2]
    # SGLang before 0.5.21, which has the choice in several functions.
    if use_attn_tp_group:
        return parallel_state.get_attn_tp_group()
    experts = parallel_state.get_moe_ep_group()
    return experts if experts.world_size > 1 else parallel_state.get_moe_tp_group()
