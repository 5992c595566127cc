"""Where tensors lie in memory: what kernels can take, and what they may write to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["disjoint", "plain", "plain_copy"]


def plain(tensor: torch.Tensor) -> bool:
    """Whether a kernel can take the tensor as it is: contiguous, aligned to 16 bytes."""
    return tensor.is_contiguous() and not tensor.data_ptr() & 15


def plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where kernels can take it, else a contiguous copy aligned to 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() & 15 else tensor


def disjoint(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors share no memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first + one.nbytes <= second or second + other.nbytes <= first
