"""The test data of the admission test: numbers by a hash of their place, and floats whose sum depends on its order."""

from __future__ import annotations

import torch

__all__ = ["mixed_bits", "ordered_values"]

# The exponents of the small terms, which half precision holds with all their digits; and that of the large ones, beside
# which float32 loses digits of the small ones.
_LOWEST_EXPONENT, _EXPONENTS = -12, 18
_LARGE_EXPONENT = 13


def mixed_bits(index: torch.Tensor, rank: int, salt: int) -> torch.Tensor:
    """Return an integer below 2^19 for each index.

    The data of two ranks, or of one rank shifted by a few elements, have nothing in common, even if only a bit of them
    is used.
    """
    mixed = (index * 7919 + rank * 104729 + salt * 31) * 2654435761 % (1 << 32)
    return (mixed ^ mixed >> 15) * 2246822519 % (1 << 32) >> 13


def ordered_values(dtype: str, term: int, terms: int, salt: int, numel: int) -> torch.Tensor:
    """Return one term of sums whose bits depend on the order of the terms, and on each rounding.

    At each place two of the terms are large and cancel each other. In another order, the sum has lost other digits of
    the terms between them.

    Args:
        dtype: one of the floats in `comm_core.types.DTYPES`.
        term: the number of this term: a rank, or the residual after the last rank.
        terms: the number of terms.
        salt: makes the values of one call differ from those of another.
        numel: the number of values.
    """
    index = torch.arange(numel)
    fraction = _fraction(index, term, salt)
    exponent = mixed_bits(index, term, salt + 29) % _EXPONENTS + _LOWEST_EXPONENT
    small = torch.ldexp(fraction, exponent)
    # The same on all ranks.
    first = mixed_bits(index, terms, salt + 41) % terms
    second = (first + 1 + mixed_bits(index, terms, salt + 53) % (terms - 1)) % terms
    large = torch.ldexp(1 + _fraction(index, terms, salt).abs(), torch.full_like(index, _LARGE_EXPONENT))
    values = torch.where(first == term, large, torch.where(second == term, -large, small))
    return values.to(getattr(torch, dtype))


def _fraction(index: torch.Tensor, term: int, salt: int) -> torch.Tensor:
    """Return numbers from -1 to 1 with more digits than any dtype but float64 keeps."""
    coarse = mixed_bits(index, term, salt).double() / (1 << 18) - 1
    return coarse + mixed_bits(index, term, salt + 17).double() / float(1 << 38)
