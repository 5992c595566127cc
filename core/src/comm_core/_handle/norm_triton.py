"""The kernel of the composed operation: the residual's add and the RMSNorm, one program a row. Imports Triton.

`comm_core.norm` imports it where it is needed. `JITFunction.warmup` compiles ahead, and what it returns launches
without a look at its arguments' types, which is most of what a launch costs (as in Triton's tutorial on softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

__all__ = ["add_rms_norm_kernel", "compiled", "launch_shape"]

# Elements of a row that a program holds at once, 32 a thread: twice as many spill registers in float32 (ptxas, 9.0).
_MOST_HELD = 16384
# Elements that a thread holds, where the row is short enough: 16 bytes of a half precision, one access.
_A_THREAD = 8
_MOST_WARPS = 16


def launch_shape(hidden_size: int) -> tuple[int, int]:
    """(elements that a program holds at once, warps of a program) for rows of `hidden_size` elements."""
    block = min(triton.next_power_of_2(hidden_size), _MOST_HELD)
    return block, min(max(block // (32 * _A_THREAD), 1), _MOST_WARPS)


def _add_rms_norm(
    tensor: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    summed: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    HIDDEN: tl.constexpr,  # noqa: N803 - Triton's way to write a constant
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    # The outputs may be the inputs: a program writes to no element that it, or another one, still has to read.
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)
    if HIDDEN <= BLOCK:
        inside = columns < HIDDEN
        sums = tl.load(tensor + row + columns, mask=inside, other=0.0).to(tl.float32)
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
            sums += tl.load(residual + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            squares += sums * sums
        scale = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
        for start in range(0, HIDDEN, BLOCK):
            inside = start + columns < HIDDEN
            sums = tl.load(tensor + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            sums += tl.load(residual + row + start + columns, mask=inside, other=0.0).to(tl.float32)
            gain = tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
            tl.store(summed + row + start + columns, sums, mask=inside)
            tl.store(normed + row + start + columns, sums * scale * gain, mask=inside)


#: (tensor, residual, weight, normed, summed, eps, weight_offset, HIDDEN, BLOCK): contiguous `[num_tokens, HIDDEN]` of
#: one dtype, the weight `[HIDDEN]`; a grid of `num_tokens` programs.
add_rms_norm_kernel: Any = triton.jit(_add_rms_norm)


def compiled(dtype: torch.dtype, hidden_size: int, num_warps: int = 0) -> Callable[..., None]:
    """Compile for the current device and load.

    Args:
        dtype: float32, float16 or bfloat16.
        hidden_size: elements a row.
        num_warps: of a program, 0 for what `launch_shape` says; for comparisons.

    Returns:
        (num_tokens, tensor, residual, weight, normed, summed, eps, weight_offset) launches on the current device and
        stream. The tensors are contiguous and aligned to 16 bytes, the last two floats.

    Raises:
        Exception: whatever Triton raises, such as RuntimeError where it finds no C compiler.
    """
    block, warps = launch_shape(hidden_size)
    kernel = add_rms_norm_kernel.warmup(
        *(dtype,) * 5, 1e-6, 0.0, HIDDEN=hidden_size, BLOCK=block, num_warps=num_warps or warps, grid=(1,)
    )
    kernel[1, 1, 1]  # a launch would load it into the device; this does it now

    def launch(num_tokens: int, *arguments: Any) -> None:
        kernel[(num_tokens, 1, 1)](*arguments, hidden_size, block)

    return launch
