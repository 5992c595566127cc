"""Runs the kernel of the composed operation in Triton's interpreter and compares it with torch's kernels."""

from __future__ import annotations

import itertools

import torch
from comm_core._handle import fallback, norm_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around a program's elements, with and without a remainder; the last goes in two rounds.
SHAPES = ((1, 1), (3, 8), (17, 96), (5, 2880), (2, 4096), (2, 16392))


def compare(
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype],
    shape: tuple[int, int],
    eps: float,
    offset: float,
    in_place: bool,
) -> None:
    """`dtypes` are the tensor's, the residual's, None without one, and the weight's."""
    generator = torch.Generator().manual_seed(sum(shape))
    dtype, residual_dtype, weight_dtype = dtypes
    x, r, w = (torch.randn(size, generator=generator) for size in (shape, shape, shape[1:]))
    x, r, w = x.to(dtype), None if residual_dtype is None else r.to(residual_dtype), w.to(weight_dtype)
    expected = fallback._torch_add_rms_norm(x, r, w, eps, offset, None, None)
    y, s = (x, x.clone() if r is None else r) if in_place else map(torch.empty_like, expected)
    block, _ = norm_triton.launch_shape(shape[1])
    norm_triton.add_rms_norm_kernel[(shape[0],)](
        x, x if r is None else r, w, y, s, eps, offset, HIDDEN=shape[1], BLOCK=block, HAS_RESIDUAL=r is not None
    )
    # The interpreter cuts bfloat16 off, where a GPU rounds to the nearest.
    exact = s.dtype is not torch.bfloat16
    unit = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), expected[0].double(), rtol=unit, atol=1e-6)
    torch.testing.assert_close(s.double(), expected[1].double(), rtol=0 if exact else unit, atol=0)


if __name__ == "__main__":
    count = 0
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        for residual_dtype, weight_dtype in {(dtype, dtype), (None, dtype), (torch.float32, torch.float32)}:
            compare((dtype, residual_dtype, weight_dtype), shape, 1e-6, 0.0, in_place=False)
            compare((dtype, residual_dtype, weight_dtype), shape, 0.25, 1.0, in_place=True)
            count += 2
    print(count, "cases")  # noqa: T201 - what the test looks at
