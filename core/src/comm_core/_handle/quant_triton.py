"""A Triton kernel that quantises rows to FP8, one program a row; `quant.py` has the formulas. Imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from comm_core._handle.norm_triton import launch_shape

if TYPE_CHECKING:
    import torch

__all__ = ["compile_kernel", "quantize_kernel"]

_GROUP = tl.constexpr(128)
_LARGEST = tl.constexpr(448.0)
_LEAST_TOKEN_SCALE = tl.constexpr(1 / (448.0 * 512))
_LEAST_GROUP_MAXIMUM = tl.constexpr(1e-10)


def _zero_nans(values: tl.tensor) -> tl.tensor:
    return tl.where(values == values, tl.abs(values), 0.0)  # noqa: PLR0124 - false for a NaN


#: Returns the absolute values, 0 for a NaN.
_magnitudes: Any = triton.jit(_zero_nans)


def _quantize(
    normed: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    FORM: tl.constexpr,  # noqa: N803 - Triton's convention for constants
    HIDDEN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    # FORM is the index in `QUANTS`. `div_rn` rounds as torch's kernels do, and `/` doesn't.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if FORM == 0:
        factor = tl.div_rn(1.0, tl.load(scale))
    if FORM == 1:
        maxima = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            inside = start + columns < HIDDEN
            values = tl.load(normed + row * HIDDEN + start + columns, mask=inside, other=0.0).to(tl.float32)
            maxima = tl.maximum(maxima, _magnitudes(values))
        divisor = tl.maximum(tl.div_rn(tl.max(maxima, axis=0), _LARGEST), _LEAST_TOKEN_SCALE)
        tl.store(scale + row * row_stride, divisor)
    for start in range(0, HIDDEN, BLOCK):
        inside = start + columns < HIDDEN
        values = tl.load(normed + row * HIDDEN + start + columns, mask=inside, other=0.0).to(tl.float32)
        if FORM == 0:
            scaled = values * factor
        elif FORM == 1:
            scaled = tl.div_rn(values, tl.zeros([BLOCK], dtype=tl.float32) + divisor)
        else:
            groups = tl.reshape(values, [BLOCK // _GROUP, _GROUP])
            maxima = tl.maximum(tl.max(_magnitudes(groups), axis=1), _LEAST_GROUP_MAXIMUM)
            divisors = tl.div_rn(maxima, tl.zeros([BLOCK // _GROUP], dtype=tl.float32) + _LARGEST)
            group = start // _GROUP + tl.arange(0, BLOCK // _GROUP)
            places = scale + row * row_stride + group.to(tl.int64) * column_stride
            tl.store(places, divisors, mask=group < HIDDEN // _GROUP)
            spread = tl.broadcast_to(tl.expand_dims(divisors, 1), [BLOCK // _GROUP, _GROUP])
            scaled = tl.reshape(tl.div_rn(groups, spread), [BLOCK])
        saturated = tl.clamp(scaled, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + row * HIDDEN + start + columns, saturated.to(out.dtype.element_ty), mask=inside)


#: Takes (normed, out, scale, row_stride, column_stride, FORM, HIDDEN, BLOCK): contiguous tensors
#: `[num_tokens, HIDDEN]`, and the scales with their strides in elements. The grid has `num_tokens` programs.
quantize_kernel: Any = triton.jit(do_not_specialize=["row_stride", "column_stride"])(_quantize)


def compile_kernel(dtype: torch.dtype, hidden_size: int, form: int) -> Callable[..., None]:
    """Compile the kernel for the current device and load it.

    Args:
        dtype: the dtype of the norm: float32, float16 or bfloat16.
        hidden_size: elements a row.
        form: the index in `comm_core.types.QUANTS`.

    Returns:
        A function of (num_tokens, normed, out, scale, row_stride, column_stride) that launches the kernel on the
        current device and stream. The tensors are aligned to 16 bytes, but for the scale of "fp8_static".

    Raises:
        Exception: Triton failed, for example because the device has no FP8 conversions.
    """
    import torch

    block, warps = launch_shape(hidden_size)
    block = max(block, _GROUP.value)
    # The last two numbers stand for any strides.
    kernel = quantize_kernel.warmup(
        *(dtype, torch.float8_e4m3fn, torch.float32, 3, 3),
        FORM=form,
        HIDDEN=hidden_size,
        BLOCK=block,
        num_warps=warps,
        grid=(1,),
    )
    kernel[1, 1, 1]  # loads the kernel into the device, which the first launch would do otherwise

    def launch(num_tokens: int, *arguments: Any) -> None:
        kernel[(num_tokens, 1, 1)](*arguments, form, hidden_size, block)

    return launch
