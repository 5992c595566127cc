"""FP8 quantisation from its definition: divisions in fp64, and the nearest of all numbers that the format has."""

from __future__ import annotations

import torch


def _numbers() -> torch.Tensor:
    """The finite float8_e4m3fn that aren't negative, ascending; the index of each is its code."""
    codes = torch.arange(127)
    exponents, fractions = codes // 8, codes % 8
    normal = (8 + fractions) * 2.0 ** (exponents.double() - 10)
    return torch.where(exponents == 0, fractions * 2.0**-9, normal)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest, ties to the even code; saturate."""
    numbers, wide = _numbers(), values.double().abs().clamp(max=448.0).flatten()
    above = torch.searchsorted(numbers, wide).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = numbers[above] - wide, wide - numbers[below]
    codes = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    codes = torch.where(values.signbit().flatten(), codes + 128, codes)
    codes = torch.where(values.isnan().flatten(), 127, codes)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).view(values.shape)


def _divided(one: torch.Tensor, other: torch.Tensor | float) -> torch.Tensor:
    """The quotient of float32 numbers, in float32: fp64 has more than twice their bits, so this rounds once."""
    return (one.double() / other).float()


def quantized(normed: torch.Tensor, form: str, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantised values and their scales, `[..., 1]` or `[..., hidden_size / 128]`."""
    values = normed.float()
    if scale is not None:
        return to_fp8(values * _divided(torch.ones(1), scale.double())), scale
    columns = 1 if form == "fp8_per_token" else normed.shape[-1] // 128
    groups = values.view(*values.shape[:-1], columns, -1)
    largest = groups.abs().amax(-1)
    if form == "fp8_per_token":
        scales = _divided(largest, 448.0).clamp(min=torch.tensor(1 / (448.0 * 512)))
    else:
        scales = _divided(largest.clamp(min=torch.tensor(1e-10)), 448.0)
    return to_fp8(_divided(groups, scales.double().unsqueeze(-1))).view(values.shape), scales
