"""Checks of a call's operands that raise before anything is sent: the same for every backend and on every path."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeAlias

import torch

from comm_core.tokens import TokenCounts

__all__ = [
    "NumTokens",
    "check_fused_inputs",
    "check_fused_outs",
    "check_num_tokens",
    "check_out",
    "check_tensors",
    "count_of",
    "is_mixed",
    "refuse_jit_trace",
    "share_memory",
    "warn_without_gradient",
]

#: The number of real rows of a padded batch, as callers pass it; None: all rows are real.
NumTokens: TypeAlias = TokenCounts | torch.Tensor | None

_warned_of_gradient = False


def check_tensors(**operands: object) -> None:
    """Raise if an operand isn't a tensor; a residual of None is no residual.

    Raises:
        TypeError: an operand isn't a `torch.Tensor`; the text has its name.
    """
    for name, operand in operands.items():
        if not isinstance(operand, torch.Tensor) and not (operand is None and name == "residual"):
            raise TypeError(f"expected a torch.Tensor as {name}; got {type(operand).__name__}")


def check_out(
    tensor: torch.Tensor,
    out: torch.Tensor,
    name: str = "out",
    dtype: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
) -> None:
    """Raise if `out` can't receive a result of the shape and dtype of `tensor`.

    Args:
        tensor: the input.
        out: the output.
        name: the output's name in the text.
        dtype: the result's dtype; None: that of `tensor`.
        shape: the result's shape; None: that of `tensor`.

    Raises:
        TypeError: `out` isn't a tensor, or has no memory.
        ValueError: `out` has another shape, dtype, device or layout, or overlaps itself.
    """
    if out is tensor and tensor.is_contiguous():
        return
    check_tensors(**{name: out})
    if dtype is not None or shape is not None:
        dtype, shape = dtype or tensor.dtype, tensor.shape if shape is None else shape
        if (
            (*out.shape,) != (*shape,)
            or out.dtype != dtype
            or out.device != tensor.device
            or out.layout != tensor.layout
        ):
            raise ValueError(
                f"expected as {name} a tensor of {dtype} {list(shape)}, {tensor.layout}, on {tensor.device}; got "
                f"{out.dtype} {list(out.shape)}, {out.layout}, on {out.device}"
            )
    elif (
        out.shape != tensor.shape
        or out.dtype != tensor.dtype
        or out.device != tensor.device
        or out.layout != tensor.layout
    ):
        raise ValueError(
            f"{name} must have the dtype, shape, layout and device of its input: "
            f"{name} is {out.dtype} {list(out.shape)}, {out.layout}, on {out.device}; the input is {tensor.dtype} "
            f"{list(tensor.shape)}, {tensor.layout}, on {tensor.device}"
        )
    if out.layout is not torch.strided:
        return  # refused with the input
    if out.numel() and out.storage_offset() * out.itemsize + _extent_nbytes(out) > out.untyped_storage().nbytes():
        raise TypeError(f"{name} has no memory to write to: its storage was freed. Pass a tensor with memory")
    if not out.is_contiguous() and _overlaps_itself(out):
        raise ValueError(
            f"{name}, {list(out.shape)} with strides {list(out.stride())}, has several elements at one address; pass a "
            "tensor without overlap"
        )


def check_fused_inputs(tensor: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Raise if the inputs of a fused call don't match each other in shape and dtype.

    Raises:
        TypeError: an input isn't a tensor, or a dtype isn't floating or doesn't match.
        ValueError: the shapes don't match.
    """
    check_tensors(tensor=tensor, residual=residual, weight=weight)
    shape, dtype = tensor.shape, tensor.dtype
    like = tensor if residual is None else residual
    if not shape or like.shape != shape or weight.shape != shape[-1:]:
        raise ValueError(
            "expected tensor and residual [num_tokens, hidden_size] or [..., hidden_size], weight [hidden_size]; got "
            f"{list(shape)}, {list(like.shape)} and {list(weight.shape)}"
        )
    taken = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
    if not dtype.is_floating_point or like.dtype not in taken or weight.dtype not in taken:
        raise TypeError(
            "expected one floating dtype for tensor, residual and weight, or a residual or weight of float32 beside a "
            f"16-bit tensor; got {dtype}, {like.dtype} and {weight.dtype}. Convert the others to the dtype of tensor"
        )


def is_mixed(tensor: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Return whether a fused call has no residual, or inputs of two dtypes: core composes such a call."""
    return residual is None or not residual.dtype == weight.dtype == tensor.dtype


def check_fused_outs(
    tensor: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | None, residual_out: torch.Tensor | None
) -> None:
    """Raise if `out` or `residual_out` can't receive its result, or both would be written to the same memory.

    Raises:
        TypeError, ValueError: as in `check_out`.
        ValueError: `out` and `residual_out` share memory.
    """
    if out is not None:
        check_out(tensor, out)
    if residual_out is not None:
        check_out(tensor if residual is None else residual, residual_out, "residual_out")
        if out is not None and (out is residual_out or share_memory(out, residual_out)):
            raise ValueError(
                "out and residual_out share memory, but the call writes a different result to each; pass disjoint "
                "tensors"
            )


def refuse_jit_trace() -> None:
    """Raise if `torch.jit.trace` is recording: it would record neither the call nor its result's dependence on it.

    Raises:
        TypeError: `torch.jit.trace` is recording.
    """
    if torch._C._get_tracing_state() is not None:  # noqa: SLF001 - typed, and what torch.jit.is_tracing asks
        raise TypeError(
            "torch.jit.trace can't record a call of a comm_core handle. Use torch.compile or torch.export, which "
            "record torch.ops.comm_core"
        )


def warn_without_gradient(*inputs: torch.Tensor) -> None:
    """Warn, once a process, that the result carries no gradient although an input requires one."""
    global _warned_of_gradient  # noqa: PLW0603 - once a process, as torch warns of an operator without a gradient
    if _warned_of_gradient or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return
    _warned_of_gradient = True
    warnings.warn(
        "comm_core: an input of this all-reduce requires grad, but the result carries no gradient: backward() stops "
        "here. For inference, call it under torch.no_grad(); for training, use a differentiable all-reduce such as "
        "torch.distributed.nn.functional.all_reduce",
        stacklevel=4,
    )


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether two elements of a strided tensor have one address."""
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < span:  # each dimension usually steps over the smaller ones
                return len(set(_element_offsets(tensor).tolist())) < tensor.numel()
            span += (size - 1) * stride
    return False


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether an element of one tensor lies on an element of the other."""
    if not (one.numel() and other.numel()) or one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    spans = [(tensor.data_ptr(), tensor.data_ptr() + _extent_nbytes(tensor)) for tensor in (one, other)]
    if spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]:
        return False
    if one.is_contiguous() or other.is_contiguous():
        return True
    # The addresses of all parts of the elements, parts that are as large as the smaller tensor's elements.
    part = min(one.itemsize, other.itemsize)
    addresses = [
        tensor.data_ptr() + _element_offsets(tensor)[:, None] * tensor.itemsize + torch.arange(0, tensor.itemsize, part)
        for tensor in (one, other)
    ]
    return bool(torch.isin(*addresses).any())


def _extent_nbytes(tensor: torch.Tensor) -> int:
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.itemsize


def _element_offsets(tensor: torch.Tensor) -> torch.Tensor:
    """Return the offset of each element from the first, in elements: `[numel]`, int64, on the CPU."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.flatten()


def count_of(num_tokens: TokenCounts | torch.Tensor) -> torch.Tensor:
    """Return the count that kernels read.

    Raises:
        TypeError: `num_tokens` is something else.
    """
    if isinstance(num_tokens, torch.Tensor):
        return num_tokens
    if isinstance(num_tokens, TokenCounts):
        return num_tokens.total
    raise TypeError(
        f"num_tokens is of type {type(num_tokens).__name__}, but kernels read the number on the device: pass a "
        "comm_core.TokenCounts, and set its number by fill"
    )


def check_num_tokens(num_tokens: TokenCounts | torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the count that kernels read, once it has passed the checks.

    Args:
        num_tokens: the counts, or their `total`.
        tensor: the tensor that is reduced.

    Raises:
        TypeError: `num_tokens` is something else, or not int32.
        ValueError: its bucket isn't the tensor's rows, or it has another device or several elements.
    """
    count = count_of(num_tokens)
    rows = math.prod(tensor.shape[:-1])
    if isinstance(num_tokens, TokenCounts) and num_tokens.bucket != rows:
        raise ValueError(
            f"num_tokens counts the rows of a bucket of {num_tokens.bucket}, but the tensor has {rows}: expected "
            f"comm_core.TokenCounts(bucket={rows}, ...), or a tensor of {num_tokens.bucket} rows"
        )
    if count.dtype is not torch.int32:
        raise TypeError(f"num_tokens is {count.dtype}; kernels read int32. comm_core.TokenCounts has it")
    if count.numel() != 1 or count.device != tensor.device:
        raise ValueError(
            f"num_tokens is {list(count.shape)} on {count.device}; expected one element on {tensor.device}, the "
            f"tensor's device: comm_core.TokenCounts(..., device={str(tensor.device)!r})"
        )
    return count
