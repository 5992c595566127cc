"""The handle's calls as operators, for code that records or intercepts torch's operators instead of running them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from comm_core._handle import quant as forms
from comm_core._handle.checks import count_of

if TYPE_CHECKING:
    from comm_core._handle.checked_calls import CheckedCalls
    from comm_core._handle.checks import NumTokens

__all__ = [
    "all_reduce",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_quant",
    "empty_contiguous",
    "intercepts",
]


def intercepts() -> bool:
    """Return whether something intercepts operators in this thread: a torch dispatch mode or a functorch transform.

    Under `FakeTensorMode`, for example, an allocation has no memory that a kernel could write to.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001 - torch has no public function for either


def empty_contiguous(tensor: torch.Tensor, *_rest: Any, **_named: Any) -> torch.Tensor:
    """Return a new contiguous tensor like `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _count_argument(num_tokens: NumTokens) -> dict[str, torch.Tensor]:
    """Return the operators' argument for `num_tokens`, if it is given.

    The bucket isn't compared with the tensor's rows, since that would make a dynamic size a constant.
    """
    if num_tokens is None:
        return {}
    return {"num_tokens": count_of(num_tokens)}


def all_reduce(
    self: CheckedCalls, tensor: torch.Tensor, out: torch.Tensor | None = None, num_tokens: NumTokens = None
) -> torch.Tensor:
    """Call `Backend.all_reduce` as an operator."""
    if out is None:
        result: torch.Tensor = torch.ops.comm_core.all_reduce(tensor, self.group_name, **_count_argument(num_tokens))
        return result
    if out is tensor:
        torch.ops.comm_core.all_reduce_(tensor, self.group_name, **_count_argument(num_tokens))
    else:
        torch.ops.comm_core.all_reduce_out(tensor, out, self.group_name, **_count_argument(num_tokens))
    return out


def all_reduce_add_rms_norm(
    self: CheckedCalls,
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    num_tokens: NumTokens = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `Backend.all_reduce_add_rms_norm` as an operator."""
    if out is None and residual_out is None:
        pair: tuple[torch.Tensor, torch.Tensor] = torch.ops.comm_core.all_reduce_add_rms_norm(
            tensor, residual, weight, self.group_name, eps, weight_offset, **_count_argument(num_tokens)
        )
        return pair
    out = empty_contiguous(tensor) if out is None else out
    residual_out = empty_contiguous(tensor if residual is None else residual) if residual_out is None else residual_out
    torch.ops.comm_core.all_reduce_add_rms_norm_out(
        tensor, residual, weight, out, residual_out, self.group_name, eps, weight_offset, **_count_argument(num_tokens)
    )
    return out, residual_out


def all_reduce_add_rms_norm_quant(
    self: CheckedCalls,
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    quant: str,
    scale: torch.Tensor | None = None,
    column_major_scales: bool = False,
    with_norm: bool = False,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    num_tokens: NumTokens = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Call `Backend.all_reduce_add_rms_norm_quant` as an operator."""
    given = scale if forms.is_static(quant) else None
    if out is None and residual_out is None and norm_out is None and scale is given:
        q, scales, s, y = torch.ops.comm_core.all_reduce_add_rms_norm_quant(
            *(tensor, residual, weight, quant, given, self.group_name, eps, weight_offset),
            with_norm=with_norm,
            column_major_scales=column_major_scales,
            **_count_argument(num_tokens),
        )
        return q, scales if given is None else given, s, y if with_norm else None
    if scale is None:
        if forms.is_static(quant):
            raise TypeError(f"{quant} needs scale, a float32 tensor of one element")
        scale = forms.empty_scale(tensor, quant, column_major_scales)
    out = forms.empty_out(tensor) if out is None else out
    residual_out = empty_contiguous(tensor if residual is None else residual) if residual_out is None else residual_out
    norm_out = empty_contiguous(tensor) if norm_out is None and with_norm else norm_out
    torch.ops.comm_core.all_reduce_add_rms_norm_quant_out(
        *(tensor, residual, weight, quant, given, out, None if forms.is_static(quant) else scale, residual_out),
        *(norm_out, self.group_name, eps, weight_offset),
        **_count_argument(num_tokens),
    )
    return out, scale, residual_out, norm_out
