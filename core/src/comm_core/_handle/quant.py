"""FP8 quantisation of normed rows: the forms, their scales, and the arithmetic.

All of it is in float32, on the norm as rounded to its dtype, with vLLM's conventions:

    fp8_static     q = y · (1 / scale)                                        `static_scaled_fp8_quant`
    fp8_per_token  scale = max(max |y| / 448, 1 / (448 · 512)), q = y / scale  `dynamic_per_token_scaled_fp8_quant`
    fp8_per_group  scale = max(max |y|, 1e-10) / 448, q = y / scale            `per_token_group_quant_fp8`

q is saturated at ±448, the largest number of float8_e4m3fn, and rounded to the nearest, ties to even. A NaN stays a
NaN, and doesn't count for the scale.
"""

from __future__ import annotations

import math

import torch

from comm_core._handle import checks, norm
from comm_core._handle.operands import copy_to_out, is_kernel_ready, may_write, to_kernel_ready
from comm_core.types import QUANTS

__all__ = [
    "FP8",
    "GROUP_SIZE",
    "check_form",
    "check_operands",
    "empty_out",
    "empty_scale",
    "is_static",
    "is_writable_scale",
    "quantize",
    "quantize_by_torch",
    "scale_shape",
]

FP8 = torch.float8_e4m3fn
#: The elements that share a scale in "fp8_per_group".
GROUP_SIZE = 128
_STATIC, _PER_TOKEN, _PER_GROUP = QUANTS
_LARGEST = 448.0
_LEAST_TOKEN_SCALE = 1 / (_LARGEST * 512)
_LEAST_GROUP_MAXIMUM = 1e-10
# Column-major scales begin each column at a multiple of 16 bytes, as TMA loads require.
_COLUMN_MULTIPLE = 4


def is_static(quant: str) -> bool:
    """Return whether the caller gives the scale."""
    return quant == _STATIC


def check_form(quant: str, hidden_size: int) -> None:
    """Raise `ValueError` if there is no such form, or not for rows of `hidden_size` elements."""
    if quant not in QUANTS:
        raise ValueError(f"quant={quant!r} isn't one of {', '.join(QUANTS)}")
    if quant == _PER_GROUP and (hidden_size % GROUP_SIZE or not hidden_size):
        raise ValueError(f"{quant} needs a hidden_size that is a multiple of {GROUP_SIZE}; got {hidden_size}")


def check_operands(tensor: torch.Tensor, quant: str, scale: torch.Tensor | None, out: torch.Tensor | None) -> None:
    """Raise if `scale` or `out` doesn't fit the tensor and the form.

    Raises:
        TypeError: one of them isn't a tensor, or has no memory; or the form needs a scale.
        ValueError: one of them has the wrong dtype, shape, layout or device, or overlaps itself.
    """
    check_form(quant, tensor.shape[-1])
    if is_static(quant):
        if not isinstance(scale, torch.Tensor):
            raise TypeError(f"{quant} needs scale, a float32 tensor of one element; got {type(scale).__name__}")
        if scale.dtype is not torch.float32 or scale.numel() != 1 or scale.device != tensor.device:
            raise ValueError(
                f"expected as scale a float32 tensor of one element on {tensor.device}; got {scale.dtype} "
                f"{list(scale.shape)} on {scale.device}"
            )
    elif scale is not None:
        checks.check_out(tensor, scale, "scale", torch.float32, scale_shape(tensor.shape, quant))
    if out is not None:
        checks.check_out(tensor, out, "out", FP8)


def scale_shape(shape: torch.Size, quant: str) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of this shape, for a form other than "fp8_static"."""
    return (*shape[:-1], 1 if quant == _PER_TOKEN else shape[-1] // GROUP_SIZE)


def empty_out(tensor: torch.Tensor) -> torch.Tensor:
    """Return a new contiguous tensor for the quantised values."""
    return torch.empty(tensor.shape, dtype=FP8, device=tensor.device)


def empty_scale(tensor: torch.Tensor, quant: str, column_major: bool) -> torch.Tensor:
    """Return a new tensor for the scales, for a form other than "fp8_static"; see `all_reduce_add_rms_norm_quant`."""
    shape = scale_shape(tensor.shape, quant)
    if not column_major or quant == _PER_TOKEN:
        return torch.empty(shape, dtype=torch.float32, device=tensor.device)
    num_tokens = math.prod(shape[:-1])
    padded = (num_tokens + _COLUMN_MULTIPLE - 1) // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE
    columns = torch.empty((shape[-1], padded), dtype=torch.float32, device=tensor.device)
    return columns[:, :num_tokens].t().view(shape)


def is_writable_scale(scale: torch.Tensor) -> bool:
    """Return whether a hook, or the kernel here, may write to these scales `[num_tokens, columns]`.

    They are row-major and contiguous, or column-major, where columns may be farther apart than their length.
    """
    if scale.__class__ is not torch.Tensor or scale.requires_grad or scale.data_ptr() & 15 or not scale.data_ptr():
        return False
    if not may_write(scale):
        return False
    return scale.is_contiguous() or (scale.stride(0) == 1 and scale.stride(1) >= scale.shape[0])


def quantize(
    normed: torch.Tensor, quant: str, scale: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows as the hook `all_reduce_add_rms_norm_quant` quantises its norm, bit for bit.

    CUDA tensors take one Triton kernel if Triton is installed; otherwise several of torch's kernels run.

    Args:
        normed: `[num_tokens, hidden_size]`, floating point.
        quant: one of `comm_core.types.QUANTS`.
        scale: for "fp8_static", float32 of one element; else the tensor that receives the scales.
        out: the tensor that receives the quantised values, float8_e4m3fn; None allocates it.

    Returns:
        `out`, or the new tensor, and `scale`.
    """
    results = _triton_quantize(normed, quant, scale, out) if normed.is_cuda else None
    return results or quantize_by_torch(normed, quant, scale, out)


@torch.no_grad()
def quantize_by_torch(
    normed: torch.Tensor, quant: str, scale: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `quantize` with torch's kernels."""
    values = normed.float()
    # Tensors, because torch multiplies a CUDA tensor by a number's reciprocal instead of dividing by the number.
    largest = values.new_full((), _LARGEST)
    if is_static(quant):
        scaled = values * (torch.ones_like(largest) / scale.reshape(()))
    elif not values.numel():
        scale.fill_(_LEAST_TOKEN_SCALE)
        scaled = values
    else:
        groups = values.view(len(values), scale.shape[-1], -1)
        maxima = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)
        if quant == _PER_TOKEN:
            scales = (maxima / largest).clamp_min(_LEAST_TOKEN_SCALE)
        else:
            scales = maxima.clamp_min(_LEAST_GROUP_MAXIMUM) / largest
        copy_to_out(scales, scale)
        scaled = (groups / scales.unsqueeze(-1)).flatten(-2)
    result = scaled.clamp(-_LARGEST, _LARGEST).to(FP8)
    return copy_to_out(result, out), scale


def _triton_quantize(
    normed: torch.Tensor, quant: str, scale: torch.Tensor, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute `quantize` with one kernel; return None, with nothing done, if it can't serve."""
    num_tokens, hidden_size = normed.shape
    kernel = norm.quant_kernel(normed.device, normed.dtype, hidden_size, QUANTS.index(quant))
    if kernel is None or not num_tokens:
        return None
    direct = out if out is not None and is_kernel_ready(out) else empty_out(normed)
    scales = scale if is_static(quant) or is_writable_scale(scale) else torch.empty_like(scale)
    with torch.cuda.device(normed.device), torch.no_grad():
        kernel(num_tokens, to_kernel_ready(normed), direct, scales, *(scales.stride() if scales.dim() == 2 else (0, 0)))
        return copy_to_out(direct, out), copy_to_out(scales, scale)
