"""Runs the kernel of the composed operation in Triton's interpreter and compares it with torch's kernels."""

from __future__ import annotations

import itertools

import torch
from comm_core._handle import fallback, norm_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around a program's elements, with and without a remainder; the last goes in two rounds.
SHAPES = ((1, 1), (3, 8), (17, 96), (5, 2880), (2, 4096), (2, 16392))


def compare(dtype: torch.dtype, shape: tuple[int, int], eps: float, offset: float, in_place: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x, r, w = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape, shape[1:]))
    expected = fallback._torch_add_rms_norm(x, r, w, eps, offset, None, None)
    y, s = (x, r) if in_place else (torch.empty_like(x), torch.empty_like(x))
    block, _ = norm_triton.launch_shape(shape[1])
    norm_triton.add_rms_norm_kernel[(shape[0],)](x, r, w, y, s, eps, offset, HIDDEN=shape[1], BLOCK=block)
    # The interpreter cuts bfloat16 off, where a GPU rounds to the nearest.
    exact = dtype is not torch.bfloat16
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), expected[0].double(), rtol=unit, atol=1e-6)
    torch.testing.assert_close(s.double(), expected[1].double(), rtol=0 if exact else unit, atol=0)


if __name__ == "__main__":
    count = 0
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        compare(dtype, shape, 1e-6, 0.0, in_place=False)
        compare(dtype, shape, 0.25, 1.0, in_place=True)
        count += 2
    print(count, "cases")  # noqa: T201 - what the test looks at
