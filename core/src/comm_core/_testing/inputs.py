"""Messages for a backend under test: sizes at the edges of its ranges, values of every kind, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from comm_core.types import Rule

__all__ = ["SMALL_NBYTES", "largest_error", "make_inputs", "make_integers", "sizes_of", "sum_exactly"]

#: The largest message of most tests, in bytes: a rank computes the inputs of all ranks.
SMALL_NBYTES = 1 << 20
# Sizes inside a range, in bytes: around elements, vectors, pages, and powers of two with odd neighbours.
_INNER = (1, 2, 3, 4, 7, 15, 16, 17, 30, 33, 48, 250, 255, 1000, 1023, 1025, 4095, 4097, 8190, 65_534, 65_538, 300_006)
# Integers of floating-point dtypes whose sums are exact: up to this number, of all ranks together.
_EXACT = 256


def sizes_of(
    rules: Sequence[Rule], name: str, itemsize: int, most_nbytes: int = SMALL_NBYTES, least_nbytes: int = 1
) -> list[int]:
    """Return sizes that the backend serves, in elements, ascending: the edges of its rules, and sizes between them."""
    nbytes = set(_INNER)
    for rule in rules:
        step = max(rule.multiple_nbytes, itemsize)
        for edge in (rule.min_nbytes, most_nbytes if rule.max_nbytes is None else min(rule.max_nbytes, most_nbytes)):
            nbytes.update(edge // step * step + step * offset for offset in (-1, 0, 1))
        nbytes.update(size * step for size in (1, 3, 5, 127, 1001))
    whole = {size // itemsize for size in nbytes if least_nbytes <= size <= most_nbytes and size % itemsize == 0}
    return sorted(numel for numel in whole if numel and _owner(rules, numel * itemsize) == name)


def _owner(rules: Sequence[Rule], nbytes: int) -> str:
    return next(rule.backend for rule in rules if rule.takes(nbytes))


def make_integers(rank: int, world_size: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """Return small integers whose sum over the ranks is exact in every dtype; they differ between ranks and places."""
    limit = min(_EXACT, 2 ** (torch.finfo(dtype).bits // 2) if dtype.is_floating_point else _EXACT) // world_size
    values = (torch.arange(numel) * (rank + 3) + 7 * rank + salt) % max(2, min(limit, 100 // world_size))
    return values.to(dtype)


def make_inputs(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """Return random numbers of very different sizes, or random integers."""
    generator = torch.Generator().manual_seed(rank * 1_000_003 + numel * 31 + salt)
    if not dtype.is_floating_point:
        return torch.randint(0, 20, (numel,), generator=generator).to(dtype)
    values = torch.randn(numel, generator=generator, dtype=torch.float64)
    scales = torch.randint(-8, 6, (numel,), generator=generator)
    return (values * torch.pow(2.0, scales)).to(dtype)


def sum_exactly(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum in float64, or in int64."""
    wide = torch.float64 if inputs[0].dtype.is_floating_point else torch.int64
    return torch.stack([tensor.to(wide) for tensor in inputs]).sum(0)


def largest_error(result: torch.Tensor, inputs: Sequence[torch.Tensor]) -> float:
    """Return the largest error of a sum, in units of what rounding allows; at most 1 is right.

    A sum of W terms in a dtype of precision eps, added one by one in any order and rounded each time, is off by at most
    (W - 1) eps times the sum of the absolute values (Higham, "Accuracy and Stability of Numerical Algorithms", 2002,
    section 4.2); one more rounding is allowed, to the output's dtype. Integers are exact.
    """
    exact, got = sum_exactly(inputs), result.cpu()
    if not got.dtype.is_floating_point:
        return 0.0 if torch.equal(got, exact.to(got.dtype)) else float("inf")
    info = torch.finfo(got.dtype)
    allowed = len(inputs) * info.eps * sum_exactly([tensor.abs() for tensor in inputs]) + info.tiny
    errors = (got.double() - exact).abs() / allowed
    return float(errors.nan_to_num(nan=float("inf")).max())
