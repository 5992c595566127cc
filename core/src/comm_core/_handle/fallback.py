"""The terminal fallback of every route: `torch.distributed`, and core's own norm for the composed operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from comm_core._control.guard import raise_if_capturing
from comm_core._handle import norm
from comm_core._handle.operands import copy_to_out

__all__ = [
    "TerminalFallback",
    "add_rms_norm",
    "add_rms_norm_by",
    "all_reduce_without_world",
    "single_rank_all_reduce",
    "torch_distributed",
]


class TerminalFallback:
    """The terminal fallback of one group; it refuses to be captured before NCCL has a communicator for the group.

    NCCL creates the communicator in the group's first call, and a capture can't contain that.

    Args:
        group: the process group.
        title: the group's name in error texts.
        reduce: sums a tensor, by the contract of the hook `all_reduce` with the process group as the session; None:
            `torch_distributed`.
    """

    def __init__(self, group: dist.ProcessGroup, title: str, reduce: Callable[..., torch.Tensor] | None = None) -> None:
        self._group = group
        self._title = title
        self._reduce = reduce or torch_distributed
        # torch creates the communicator of a group bound to a device together with the group.
        self._has_communicator = group.bound_device_id is not None

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Implement the hook `all_reduce`.

        Raises:
            CaptureError: a stream captures, and the group has no communicator yet.
        """
        if not self._has_communicator and tensor.is_cuda:
            raise_if_capturing(
                f"torch.distributed has no communicator for {self._title} yet, and can't create one",
                "Call comm.pre_capture_init, or reduce a CUDA tensor of any size, before the capture",
            )
            result = self._reduce(self._group, tensor, out)
            self._has_communicator = True
            return result
        return self._reduce(self._group, tensor, out)


def torch_distributed(group: dist.ProcessGroup, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum `tensor` over `group` with torch's own backend: NCCL for CUDA tensors, Gloo for CPU tensors.

    Follows the contract of the hook `all_reduce`, with the process group as the session. Neither library sums int16, so
    it is sent as int32.
    """
    if tensor.dtype is torch.int16:
        wide = tensor.to(torch.int32)
        dist.all_reduce(wide, group=group)
        return wide.to(torch.int16) if out is None else copy_to_out(wide, out)
    result = single_rank_all_reduce(group, tensor, out)
    dist.all_reduce(result, group=group)
    return result


def all_reduce_without_world(_group: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of this process alone: `single_rank_all_reduce`, as long as there is no world.

    Raises:
        RuntimeError: torch.distributed has been initialised since, so the caller probably expects the sum over its
            ranks.
    """
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError(
            "this handle was made before torch.distributed.init_process_group, so it sums this process alone. Call "
            "comm.get_backend() again"
        )
    return single_rank_all_reduce(None, tensor, out)


def single_rank_all_reduce(_group: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over one rank: a copy of `tensor`, written to `out` unless that is None."""
    if out is None:
        # Detached: autograd can't differentiate a sum over ranks.
        return tensor.detach().clone()
    return copy_to_out(tensor, out)


def add_rms_norm(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual and normalise: the hook `all_reduce_add_rms_norm` without its all-reduce.

    The formula, shapes and result are the hook's. Both results are computed in fp32 (fp64 for fp64) and rounded
    once. CUDA tensors take one Triton kernel if Triton is installed; otherwise several of torch's kernels run.

    Args:
        tensor: `[num_tokens, hidden_size]`, summed over the ranks already.
        residual: like `tensor`, of any floating dtype; None: there is none.
        weight: `[hidden_size]`, of any floating dtype.
        eps: added to the mean square.
        weight_offset: added to the weight.
        out: the tensor that receives the normed values; None allocates it.
        residual_out: the tensor that receives `tensor + residual`; None allocates it.

    Returns:
        The normed values, in the dtype of `tensor`, and `tensor + residual`, in that of `residual` if there is one.
    """
    return add_rms_norm_by(_mean_of_rows, tensor, residual, weight, eps, weight_offset, out, residual_out)


def _mean_of_rows(values: torch.Tensor) -> torch.Tensor:
    return values.mean(-1, keepdim=True)


def add_rms_norm_by(
    mean_of_rows: Callable[[torch.Tensor], torch.Tensor],
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `add_rms_norm`; without Triton's kernel, with these means of the rows, `[num_tokens, 1]`."""
    if tensor.is_cuda:
        results = norm.add_rms_norm(tensor, residual, weight, eps, weight_offset, out, residual_out)
        if results is not None:
            return results
    return _torch_add_rms_norm(tensor, residual, weight, eps, weight_offset, out, residual_out, mean_of_rows)


@torch.no_grad()  # results carry no gradient, and the weight is usually a parameter
def _torch_add_rms_norm(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    mean_of_rows: Callable[[torch.Tensor], torch.Tensor] = _mean_of_rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = tensor.dtype
    wide = torch.promote_types(dtype, torch.float32)
    sums = tensor.to(wide) if residual is None else tensor.to(wide) + residual.to(wide)
    scale = torch.rsqrt(mean_of_rows(sums.square()) + eps)
    normed = (sums * scale * (weight.to(wide) + weight_offset)).to(dtype)
    summed = sums.to(dtype if residual is None else residual.dtype, copy=residual is None)
    return copy_to_out(normed, out), copy_to_out(summed, residual_out)
