"""The end of every route: plain torch.distributed, and the fused operation composed of an all-reduce and a norm."""

from __future__ import annotations

import torch
import torch.distributed as dist

from comm_core._control.guard import raise_if_capturing
from comm_core._handle import norm

__all__ = ["Terminal", "add_rms_norm", "copy_of_one", "torch_distributed"]


class Terminal:
    """The end of a group's routes. NCCL makes a group's communicator in its first call, which can't be captured.

    Args:
        group: the process group.
        title: names it.
    """

    def __init__(self, group: dist.ProcessGroup, title: str) -> None:
        self._group = group
        self._title = title
        # A group that is bound to a device has its communicator from the beginning.
        self._ready = group.bound_device_id is not None

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """As the hook of that name; see `torch_distributed`.

        Raises:
            CaptureError: a stream captures the group's first CUDA tensor.
        """
        if not self._ready and tensor.is_cuda:
            raise_if_capturing(
                f"torch.distributed has no communicator for {self._title} yet, and can't make one",
                "Call comm.pre_capture_init, or reduce a CUDA tensor of any size, before the capture",
            )
            result = torch_distributed(self._group, tensor, out)
            self._ready = True
            return result
        return torch_distributed(self._group, tensor, out)


def torch_distributed(group: dist.ProcessGroup, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum `tensor` over `group` with torch's own backend: NCCL for CUDA tensors, Gloo for CPU tensors.

    As the hook `all_reduce`, with the process group for a session. int16, which neither library sums, travels as int32.
    """
    if tensor.dtype is torch.int16:
        wide = tensor.to(torch.int32)
        dist.all_reduce(wide, group=group)
        return wide.to(torch.int16) if out is None else out.copy_(wide)
    result = copy_of_one(group, tensor, out)
    dist.all_reduce(result, group=group)
    return result


def copy_of_one(_group: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The sum over a group of one rank: a copy of `tensor`, in `out` where there is one."""
    if out is None:
        # Detached, since a sum over ranks has no gradient that torch could know.
        return tensor.detach().clone()
    return out if out is tensor else out.copy_(tensor)


def add_rms_norm(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`s = tensor + residual` and its RMSNorm, in fp32 (fp64 for fp64), each rounded once.

    Shapes, dtypes and the result are those of the hook `all_reduce_add_rms_norm`, whose formula this is. CUDA tensors
    take one kernel where Triton is there (`comm_core.norm`), and several of torch's elsewhere.
    """
    if tensor.is_cuda:
        results = norm.add_rms_norm(tensor, residual, weight, eps, weight_offset, out, residual_out)
        if results is not None:
            return results
    return _by_torch(tensor, residual, weight, eps, weight_offset, out, residual_out)


@torch.no_grad()  # as in `copy_of_one`; the weight is a parameter as a rule
def _by_torch(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = tensor.dtype
    wide = torch.promote_types(dtype, torch.float32)
    sums = tensor.to(wide) + residual.to(wide)
    scale = torch.rsqrt(sums.square().mean(-1, keepdim=True) + eps)
    normed = (sums * scale * (weight.to(wide) + weight_offset)).to(dtype)
    summed = sums.to(dtype)
    return (
        normed if out is None else out.copy_(normed),
        summed if residual_out is None else residual_out.copy_(summed),
    )
