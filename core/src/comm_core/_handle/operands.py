"""The memory of tensors: which of them kernels can read and write directly, and copies of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]

__all__ = [
    "TENSOR_TYPES",
    "copy_to_out",
    "disjoint",
    "has_memory",
    "is_kernel_ready",
    "is_writable",
    "may_write",
    "stage_operands",
    "to_kernel_ready",
    "writable_by_hooks",
    "writable_or_none",
]

#: The classes that aren't wrappers. Any other subclass may wrap a tensor, and its address then says nothing.
TENSOR_TYPES: frozenset[type] = frozenset((torch.Tensor, torch.nn.Parameter))


def has_memory(tensor: torch.Tensor) -> bool:
    """Return whether the tensor's address points to memory.

    The storage of a wrapper, or of a tensor whose memory was freed, starts at address 0; a view of it lies at its own
    offset from 0.
    """
    return tensor.data_ptr() != tensor.storage_offset() * tensor.itemsize


def is_kernel_ready(tensor: torch.Tensor) -> bool:
    """Return whether kernels can take the tensor: contiguous, aligned to 16 bytes, with memory, not a negated view."""
    return _has_room(tensor) and not tensor.is_neg()


def _has_room(tensor: torch.Tensor) -> bool:
    """Return what `is_kernel_ready` does, but for negated views."""
    address = tensor.data_ptr()
    if address & 15 or not address or not tensor.is_contiguous():
        return False
    return tensor.__class__ in TENSOR_TYPES or has_memory(tensor)


def to_kernel_ready(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if kernels can take it, else a contiguous copy aligned to 16 bytes.

    Raises:
        TypeError: the tensor isn't empty and has no memory: a `FakeTensor`, a `DTensor`, or a tensor whose memory was
            freed.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()  # the result carries no gradient, and some bindings refuse such tensors
    tensor = tensor.contiguous().resolve_neg()
    if not tensor.numel():
        return tensor
    if tensor.__class__ is not torch.Tensor and has_memory(tensor):
        tensor = tensor.as_subclass(torch.Tensor)
    if has_memory(tensor) and not tensor.data_ptr() & 15:
        return tensor
    # Some wrappers clone to the tensor that they wrap. Freed memory can't be cloned.
    copy = tensor.clone() if tensor.untyped_storage().nbytes() else tensor
    if not has_memory(copy):
        raise TypeError(
            f"this {type(tensor).__name__} has no memory, so it can't be reduced: it wraps another tensor, or its "
            "storage was freed. Pass a tensor with memory, such as the wrapped one"
        )
    return copy


def may_write(out: torch.Tensor) -> bool:
    """Return whether a hook may write to a tensor, if its memory is fit for kernels.

    Not to a negated view, whose memory holds the negative of each element; nor, outside inference mode, to a tensor
    that was made in it, since torch's operators refuse to write to it.
    """
    return not out.is_neg() and (not out.is_inference() or torch.is_inference_mode_enabled())


def writable_by_hooks(out: torch.Tensor | None) -> torch.Tensor | None:
    """Return an output if hooks may write to it, by `may_write`, else None."""
    return None if out is None or not may_write(out) else out


def disjoint(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors share no memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first + one.nbytes <= second or second + other.nbytes <= first


def copy_to_out(result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Copy the result to `out` and return `out`; return the result if it is `out`, or `out` is None."""
    if out is None or result is out:
        return result
    # `out` may be a parameter, or have been made in inference mode.
    with torch.inference_mode() if out.is_inference() else torch.no_grad():
        return out.copy_(result)


def is_writable(index: int, tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Return whether a hook may write to `out` directly: it matches `tensor`, and shares no memory with it.

    Leaves out `may_write`, which takes as long as all the rest: see `Routes.find`.

    Args:
        index: the device index of `tensor`.
        tensor: a tensor that kernels can take.
        out: the output.
    """
    try:
        return (
            out.__class__ is torch.Tensor
            and out.get_device() == index
            and out.dtype is tensor.dtype
            and out.shape == tensor.shape
            and not out.requires_grad
            and (index >= 0 or out.is_cpu)
            and _has_room(out)
            and disjoint(tensor, out)
        )
    except RuntimeError:  # a sparse tensor has no address
        return False


def stage_operands(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> Operands:
    """Return a fused call's operands in the form that its hook requires.

    An input that kernels can't read is copied. An output that a hook can't write becomes None: a hook writes directly
    to an output that is its own input (`tensor` or `residual`) or disjoint from it, and disjoint from the other two.

    Raises:
        ValueError: a hook could write to both outputs, but they share memory.
    """
    if weight.requires_grad:
        # A parameter requires gradients even under `no_grad`, and some bindings refuse such tensors.
        weight = weight.detach()
    x, r, w = tensor.data_ptr(), residual.data_ptr(), weight.data_ptr()
    if (
        (x | r | w) & 15
        or not (x and r and w)
        or not (
            tensor.__class__ in TENSOR_TYPES and residual.__class__ in TENSOR_TYPES and weight.__class__ in TENSOR_TYPES
        )
        or not (tensor.is_contiguous() and residual.is_contiguous() and weight.is_contiguous())
    ):
        tensor, residual, weight = to_kernel_ready(tensor), to_kernel_ready(residual), to_kernel_ready(weight)
    elif out is None and residual_out is None:
        return tensor, residual, weight, None, None
    elif out is None and residual_out is residual:  # the common call of models, so it takes a fast path
        nbytes = tensor.nbytes
        if (x + nbytes <= r or r + nbytes <= x) and (w + weight.nbytes <= r or r + nbytes <= w):
            return tensor, residual, weight, None, residual
    y = writable_or_none(out, tensor, (residual, weight))
    s = writable_or_none(residual_out, residual, (tensor, weight))
    if y is not None and s is not None and not disjoint(y, s):
        raise ValueError(
            "out and residual_out share memory, but the call writes a different result to each; pass disjoint tensors"
        )
    return tensor, residual, weight, y, s


def writable_or_none(
    out: torch.Tensor | None, own_input: torch.Tensor, others: tuple[torch.Tensor, ...]
) -> torch.Tensor | None:
    """Return `out` if a hook may write to it directly, else None; see `stage_operands`.

    Args:
        out: the output.
        own_input: the input that `out` may be.
        others: the inputs that it must be disjoint from.
    """
    if out is None or not is_kernel_ready(out):
        return None
    if out is not own_input and not disjoint(own_input, out):
        return None
    return out if all(disjoint(other, out) for other in others) else None
