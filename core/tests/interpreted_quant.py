"""Runs the kernel that quantises in Triton's interpreter and compares it with torch's kernels, bit by bit."""

from __future__ import annotations

import itertools

import torch
from comm_core._handle import quant, quant_triton
from comm_core.types import QUANTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around a program's elements, with and without a remainder; the last goes in two rounds.
SHAPES = ((1, 128), (3, 384), (5, 2944), (2, 16512))


def compare(dtype: torch.dtype, shape: tuple[int, int], form: str, column_major: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.logspace(-9, 3, shape[0] * shape[1] // 128).view(shape[0], -1).repeat_interleave(128, -1)
    rows = (torch.randn(shape, generator=generator) * sizes).to(dtype)
    rows[0, 1], rows[-1, :128] = torch.nan, 0.0
    scales = [torch.tensor([0.037])] * 2
    if not quant.is_static(form):
        scales = [quant.empty_scale(rows, form, column_major) for _ in range(2)]
    expected, _ = quant.quantize_by_torch(rows, form, scales[0], None)
    # The interpreter rounds to FP8 in a way of its own, so it keeps float32 here.
    kept = torch.empty(shape)
    block = max(quant_triton.launch_shape(shape[1])[0], 128)
    strides = scales[1].stride() if scales[1].dim() == 2 else (0, 0)
    quant_triton.quantize_kernel[(shape[0],)](
        rows, kept, scales[1], *strides, FORM=QUANTS.index(form), HIDDEN=shape[1], BLOCK=block
    )
    assert torch.equal(scales[0], scales[1]), (dtype, shape, form)
    assert torch.equal(kept.isnan(), rows.isnan())
    assert torch.equal(kept.to(quant.FP8).view(torch.uint8), expected.view(torch.uint8)), (dtype, shape, form)


if __name__ == "__main__":
    count = 0
    for case in itertools.product(DTYPES, SHAPES, QUANTS, (False, True)):
        compare(*case)
        count += 1
    print(count, "cases")  # noqa: T201 - what the test looks at
