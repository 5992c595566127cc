"""A Triton kernel that adds the residual and applies RMSNorm, one program a row. Imports Triton.

`norm.py` imports this module at the first use. `JITFunction.warmup` compiles ahead of time, and the kernel that it
returns launches without inspecting its arguments' types, which is most of a launch's cost (as in Triton's tutorial on
softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

__all__ = ["add_rms_norm_kernel", "compile_kernel", "launch_shape"]

# Elements of a row that a program holds at once, 32 a thread: with 64, float32 spills registers (ptxas, sm_90).
_MAX_BLOCK = 16384
# Elements that a thread holds if the row is short enough: 16 bytes in half precision, one access.
_ELEMENTS_PER_THREAD = 8
_MAX_WARPS = 16


def launch_shape(hidden_size: int) -> tuple[int, int]:
    """Return (elements that a program holds at once, warps of a program) for rows of `hidden_size` elements."""
    block = min(triton.next_power_of_2(hidden_size), _MAX_BLOCK)
    return block, min(max(block // (32 * _ELEMENTS_PER_THREAD), 1), _MAX_WARPS)


def _add_rms_norm(
    tensor: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    summed: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    HIDDEN: tl.constexpr,  # noqa: N803 - Triton's convention for constants
    BLOCK: tl.constexpr,  # noqa: N803
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
) -> None:
    # The outputs may be the inputs: a program reads and writes only its own row, and no element after writing it.
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)
    if HIDDEN <= BLOCK:
        inside = columns < HIDDEN
        sums = tl.load(tensor + row + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            sums += tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
        scale = tl.rsqrt(tl.sum(sums * sums, axis=0) / HIDDEN + eps)
        tl.store(summed + row + columns, sums, mask=inside)
        tl.store(normed + row + columns, sums * scale * gain, mask=inside)
    else:
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            inside = start + columns < HIDDEN
            sums = tl.load(tensor + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                sums += tl.load(residual + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            squares += sums * sums
        scale = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
        for start in range(0, HIDDEN, BLOCK):
            inside = start + columns < HIDDEN
            sums = tl.load(tensor + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                sums += tl.load(residual + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            gain = tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
            tl.store(summed + row + start + columns, sums, mask=inside)
            tl.store(normed + row + start + columns, sums * scale * gain, mask=inside)


#: Takes (tensor, residual, weight, normed, summed, eps, weight_offset, HIDDEN, BLOCK, HAS_RESIDUAL): contiguous tensors
#: `[num_tokens, HIDDEN]`, the weight `[HIDDEN]`. The grid has `num_tokens` programs.
add_rms_norm_kernel: Any = triton.jit(_add_rms_norm)


def compile_kernel(
    dtype: torch.dtype,
    hidden_size: int,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype,
    num_warps: int = 0,
) -> Callable[..., None]:
    """Compile the kernel for the current device and load it.

    Args:
        dtype: float32, float16 or bfloat16.
        hidden_size: elements a row.
        residual_dtype: the dtype of the residual and of the sum with it; None: there is no residual, and the kernel
            takes any tensor in its place.
        weight_dtype: the dtype of the weight.
        num_warps: warps of a program, for benchmarks; 0 means the number that `launch_shape` returns.

    Returns:
        A function of (num_tokens, tensor, residual, weight, normed, summed, eps, weight_offset) that launches the
        kernel on the current device and stream. The tensors are contiguous and aligned to 16 bytes, the last two
        arguments floats.

    Raises:
        Exception: Triton failed, for example with a RuntimeError because it finds no C compiler.
    """
    block, warps = launch_shape(hidden_size)
    summed_dtype = residual_dtype or dtype
    kernel = add_rms_norm_kernel.warmup(
        *(dtype, summed_dtype, weight_dtype, dtype, summed_dtype),
        1e-6,
        0.0,
        HIDDEN=hidden_size,
        BLOCK=block,
        HAS_RESIDUAL=residual_dtype is not None,
        num_warps=num_warps or warps,
        grid=(1,),
    )
    kernel[1, 1, 1]  # loads the kernel into the device, which the first launch would do otherwise

    def launch(num_tokens: int, *arguments: Any) -> None:
        kernel[(num_tokens, 1, 1)](*arguments, hidden_size, block, residual_dtype is not None)

    return launch
