"""Where tensors lie in memory: what kernels can take, and what they may write to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]

__all__ = ["OWN", "delivered", "disjoint", "has_memory", "operands", "plain", "plain_copy"]

#: What is a tensor itself. Other classes may wrap one, and then an address tells nothing.
OWN: frozenset[type] = frozenset((torch.Tensor, torch.nn.Parameter))


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's address is one: the storage of wrappers, and one that was given back, begins at 0.

    A view of such a tensor is so many bytes behind that.
    """
    return tensor.data_ptr() != tensor.storage_offset() * tensor.itemsize


def plain(tensor: torch.Tensor) -> bool:
    """Whether a kernel can take the tensor as it is: contiguous, aligned to 16 bytes, at an address of its own."""
    address = tensor.data_ptr()
    if address & 15 or not address or not tensor.is_contiguous():
        return False
    return tensor.__class__ in OWN or has_memory(tensor)


def plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where kernels can take it, else a contiguous copy aligned to 16 bytes.

    Raises:
        TypeError: the tensor, which isn't empty, has no memory, such as a `FakeTensor` or a `DTensor`, or has given it
            back.
    """
    tensor = tensor.contiguous()
    if has_memory(tensor) and not tensor.data_ptr() & 15:
        return tensor
    # A wrapper has no memory, but the clone of some is what they wrap. Memory that was given back can't be cloned.
    copy = tensor.clone() if tensor.untyped_storage().nbytes() else tensor
    if not has_memory(copy):
        raise TypeError(f"this {type(tensor).__name__} has no memory that could be summed: pass what it stands for")
    return copy


def disjoint(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors share no memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first + one.nbytes <= second or second + other.nbytes <= first


def delivered(result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The result where it was asked for; nothing is differentiated, also where `out` is a parameter."""
    if out is None or result is out:
        return result
    with torch.no_grad():
        return out.copy_(result)


def operands(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> Operands:
    """A fused call's tensors as its hook takes them: copies of what kernels can't take, None where they can't write.

    An output is written to directly where it is its input, `tensor` or `residual`, or apart from it, and apart from the
    two others.

    Raises:
        ValueError: both outputs could be written to directly, and share memory.
    """
    if weight.requires_grad:
        # A parameter is one even where gradients are off, and some bindings refuse tensors that want one.
        weight = weight.detach()
    x, r, w = tensor.data_ptr(), residual.data_ptr(), weight.data_ptr()
    if (
        (x | r | w) & 15
        or not (x and r and w)
        or not (tensor.__class__ in OWN and residual.__class__ in OWN and weight.__class__ in OWN)
        or not (tensor.is_contiguous() and residual.is_contiguous() and weight.is_contiguous())
    ):
        tensor, residual, weight = plain_copy(tensor), plain_copy(residual), plain_copy(weight)
    elif out is None and residual_out is None:
        return tensor, residual, weight, None, None
    elif out is None and residual_out is residual:  # what models do, so it is to be quick
        nbytes = tensor.nbytes
        if (x + nbytes <= r or r + nbytes <= x) and (w + weight.nbytes <= r or r + nbytes <= w):
            return tensor, residual, weight, None, residual
    y, s = _direct(out, tensor, (residual, weight)), _direct(residual_out, residual, (tensor, weight))
    if y is not None and s is not None and not disjoint(y, s):
        raise ValueError("out and residual_out share memory, and two results go there")
    return tensor, residual, weight, y, s


def _direct(out: torch.Tensor | None, itself: torch.Tensor, others: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """`out` where a hook may write to it: it is `itself` or apart from it, and apart from the others."""
    if out is None or not plain(out):
        return None
    if out is not itself and not disjoint(itself, out):
        return None
    return out if all(disjoint(other, out) for other in others) else None
