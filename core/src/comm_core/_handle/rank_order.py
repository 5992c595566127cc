"""The terminal fallback of deterministic groups: core's own sum in rank order, and a norm that treats rows alike.

Both follow `Available.numerics`, "rank_order_fp32": an element's bits depend on the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from comm_core._handle import fallback, norm
from comm_core._handle.operands import copy_to_out
from comm_core.types import DTYPES

__all__ = ["add_rms_norm", "all_reduce", "norm_for", "sum_in_rank_order", "terminal_fallback"]

#: The most bytes that a call gathers at once, from all ranks together; larger messages are gathered in pieces.
GATHER_NBYTES = 64 << 20


def sum_in_rank_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of one tensor of each rank: in the ranks' order, in float32 at least, rounded once.

    Float64 and integers are summed in their own type.
    """
    first, *others = terms
    wide = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else first.dtype
    total = first.to(wide, copy=True)
    for term in others:
        total += term
    return total.to(first.dtype)


def all_reduce(group: dist.ProcessGroup, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum `tensor` over `group`: gather the ranks' tensors by torch.distributed, and sum them in rank order.

    Follows the contract of the hook `all_reduce`, with the process group as the session. A sum of integers has the same
    bits in any order, so torch.distributed sums them itself.

    Raises:
        TypeError: a floating dtype that isn't in `comm_core.types.DTYPES`; before anything is sent.
    """
    dtype = tensor.dtype
    if not dtype.is_floating_point:
        return fallback.torch_distributed(group, tensor, out)
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"the data type {dtype} has no sum in rank order")
    result = torch.empty_like(tensor) if out is None else out
    source, target = tensor.detach().reshape(-1), result.view(-1)
    world_size = dist.get_world_size(group)
    step = max(GATHER_NBYTES // (world_size * dtype.itemsize), 1)
    for start in range(0, source.numel(), step):
        part = source[start : start + step]
        gathered = torch.empty(world_size * part.numel(), dtype=dtype, device=tensor.device)
        # As bytes, which every library moves.
        dist.all_gather_into_tensor(gathered.view(torch.uint8), part.view(torch.uint8), group=group)
        copy_to_out(sum_in_rank_order(gathered.chunk(world_size)), target[start : start + step])
    return result


def terminal_fallback(
    group: dist.ProcessGroup, title: str, *, deterministic: bool
) -> tuple[Callable[..., torch.Tensor], fallback.TerminalFallback]:
    """Return the function of a group's terminal fallback, and its first argument."""
    reduce = all_reduce if deterministic else fallback.torch_distributed
    return fallback.TerminalFallback.all_reduce, fallback.TerminalFallback(group, title, reduce)


def norm_for(
    tensor: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, deterministic: bool
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return core's norm for a composed call, before anything of the call is sent.

    Args:
        tensor: the call's tensor.
        residual: its residual; None: there is none.
        weight: its weight.
        deterministic: whether the group is deterministic.

    Raises:
        CaptureError: in a deterministic group, the norm's kernel for such rows isn't compiled yet, and the current
            stream captures. Other groups then take torch's own kernels, which give other bits.
    """
    if not deterministic:
        return fallback.add_rms_norm
    norm.prepare_for(tensor, residual, weight)
    return add_rms_norm


def add_rms_norm(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `comm_core.fallback.add_rms_norm`, with bits that don't depend on the number of rows.

    Triton's kernel gives each row a program of its own. Without it, the squares of a row are summed in halves: torch's
    own sum splits a row among threads in a way that depends on the number of rows.
    """
    return fallback.add_rms_norm_by(_mean_of_rows, tensor, residual, weight, eps, weight_offset, out, residual_out)


def _mean_of_rows(values: torch.Tensor) -> torch.Tensor:
    return _sum_rows(values) / max(values.shape[-1], 1)


def _sum_rows(values: torch.Tensor) -> torch.Tensor:
    """Return the sums of the rows of `[num_tokens, hidden_size]`, `[num_tokens, 1]`, by adding halves to each other."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        sums = values[:, :half] + values[:, half : 2 * half]
        if values.shape[-1] % 2:
            sums[:, :1] += values[:, -1:]
        values = sums
    return values
