"""The benchmark's cases (operation, dtype, shape) and the values that keep a chain of calls exact. Pure, without torch.

A chain feeds each call's output to the next call. A sum over `world_size` ranks that hold equal values multiplies them
by `world_size`, so a chain's values leave the dtype's range after some calls. Before that, after `Pattern.length`
calls, the chain restarts from its initial values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from comm_core.types import DTYPES, QUANTS
from comm_core.types import OPS as _OPS

__all__ = [
    "ALIASES",
    "GROUP_SIZE",
    "OPS",
    "PLACES",
    "BenchCase",
    "Pattern",
    "bus_factor",
    "calls_for",
    "first_fused_sum",
    "fused_growth",
    "parse_nbytes",
    "pattern_of",
    "shapes",
    "sizes",
]

#: The operations that are timed: core's, the last one in each of its forms, which follow a colon.
OPS = (*_OPS[:2], *(f"{_OPS[2]}:{quant}" for quant in QUANTS))
#: The elements that share a scale in the form "fp8_per_group".
GROUP_SIZE = 128
#: nccl-tests' names of dtypes, with torch's names.
ALIASES = {"half": "float16", "float": "float32", "double": "float64"}
#: The output of a call is a new tensor ("out") or overwrites the input ("in"; for the fused operation, the residual).
PLACES = ("out", "in")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Bits of the significand including its leading one; the exponents of the smallest and of the largest normal number.
_FLOATS = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}
_INTEGERS = {"int64": 63, "int32": 31, "int16": 15, "int8": 7, "uint8": 8}
# The least length of a fused chain, if the significand has enough bits for it.
_MIN_FUSED_LENGTH = 8
# If the world size is a power of two, inputs are integers from 0 to this: each sum then changes only their exponent.
_MAX_INTEGER = 7
# A timed chain moves about this many bytes per rank, in this least and greatest number of calls: long enough that the
# cost around it (a graph's launch, an event) is small in comparison, short enough that a table takes minutes.
_CHAIN_NBYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_CALLS = {"cuda": (10, 200), "cpu": (3, 200)}


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One kind of call; the benchmark times every contender that supports it.

    Attributes:
        op: one of `OPS`.
        mode: "eager" or "graph".
        place: one of `PLACES`.
        dtype: one of `comm_core.types.DTYPES`.
        device_type: "cuda" or "cpu".
        shape: the reduced tensor's: `[numel]`, or `[num_tokens, hidden_size]`.
    """

    op: str
    mode: str
    place: str
    dtype: str
    device_type: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The reduced tensor's number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The reduced tensor's size in bytes."""
        return self.count * DTYPES[self.dtype]

    @property
    def fused(self) -> bool:
        """Whether the call also adds a residual and normalises."""
        return self.op != "all_reduce"

    @property
    def quant(self) -> str | None:
        """The form to which the call also quantises, one of `comm_core.types.QUANTS`; None: it doesn't."""
        return self.op.partition(":")[2] or None


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The initial values of a chain, and the number of calls for which they stay exact.

    A rank's element is an integer from 0 to `largest`, times two to the power of `exponent`; the integers differ
    between ranks.

    Attributes:
        largest: the largest integer.
        exponent: the scale's power of two.
        disjoint: whether each element is nonzero on one rank only, because the dtype can't hold a sum of more.
        length: the number of calls after which a chain restarts, so that all its values are exact.
    """

    largest: int
    exponent: int
    disjoint: bool
    length: int


def pattern_of(op: str, dtype: str, world_size: int) -> Pattern:
    """Return the pattern of a chain of `op` in a group of `world_size` ranks.

    A plain sum over ranks that hold the same value multiplies by `world_size`. A power of two only raises the exponent;
    an odd factor also takes bits of the significand.

    In a fused chain, all elements of a rank have one magnitude. After the first call the sum's elements are ±s (see
    `first_fused_sum`) and the normalised elements ±1; each further call adds `fused_growth` to s.

    Raises:
        ValueError: the group has fewer than two ranks.
    """
    if world_size < 2:
        raise ValueError(f"a group of {world_size} has nothing to reduce; at least two ranks are needed")
    if op != "all_reduce":
        limit = 1 << _FLOATS[dtype][0]

        def last_sum(largest: int) -> int:
            return first_fused_sum(world_size, largest) + fused_growth(op, world_size, largest) * _MIN_FUSED_LENGTH

        # Prefer a magnitude of its own for each rank.
        largest = next((each for each in (world_size, 2) if last_sum(each) < limit), 1)
        length = max((limit - first_fused_sum(world_size, largest)) // fused_growth(op, world_size, largest), 1)
        return Pattern(largest, 0, disjoint=False, length=length)
    odd = world_size
    while odd % 2 == 0:
        odd //= 2
    if dtype in _INTEGERS:
        bits, exponent, room = _INTEGERS[dtype], 0, _INTEGERS[dtype]
        odd = 1  # integers are never rounded; only their range is limited
    else:
        bits, lowest, highest = _FLOATS[dtype]
        exponent, room = lowest, highest - lowest
    wanted = _MAX_INTEGER if odd == 1 else 1
    disjoint = world_size * world_size > 1 << bits
    terms = 1 if disjoint else world_size
    largest = max(1, min(wanted, (1 << bits) // (terms * world_size)))
    length = 1
    # One more call is exact if its partial sums fit the significand and its result fits the range.
    while (
        largest * terms * world_size * odd**length <= 1 << bits or odd == 1
    ) and largest * terms * world_size**length < 1 << room:
        length += 1
    return Pattern(largest, exponent, disjoint, length)


def first_fused_sum(world_size: int, largest: int) -> int:
    """Return the magnitude of a fused chain's first sum: 1, 2, … `largest`, 1, 2, … by rank, plus the residual's 1."""
    return sum(rank % largest + 1 for rank in range(world_size)) + 1


def fused_growth(op: str, world_size: int, largest: int) -> int:
    """Return what each call of a fused chain adds to the sum's magnitude: the ranks' ones, the norms of a call before.

    Quantised norms can't be reduced, so in a chain of quantised calls every call reduces the first call's tensor again,
    and reads only its residual from the call before.
    """
    return world_size if op == OPS[1] else first_fused_sum(world_size, largest) - 1


def calls_for(device_type: str, nbytes: int) -> int:
    """Return the default number of calls in a timed chain."""
    low, high = _CALLS[device_type]
    return max(low, min(high, _CHAIN_NBYTES[device_type] // max(nbytes, 1)))


def bus_factor(world_size: int) -> float:
    """Return nccl-tests' ratio of bus bandwidth to algorithm bandwidth for an all-reduce: 2(n-1)/n."""
    return 2 * (world_size - 1) / world_size


def parse_nbytes(text: str) -> int:
    """Parse a size in nccl-tests' notation ("8", "64K", "1M", "2G") into bytes.

    Raises:
        ValueError: the text isn't a size.
    """
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdecimal():
        raise ValueError(f"{text!r} isn't a number of bytes such as 8, 64K, 1M or 2G")
    return int(number) * _UNITS[unit]


def sizes(first: int, last: int, factor: int, increment: int) -> Iterator[int]:
    """Yield a sweep's sizes in bytes: add `increment` at each step, or multiply by `factor` if `increment` is 0."""
    nbytes, before = first, -1
    while before < nbytes <= last:
        yield nbytes
        nbytes, before = nbytes + increment if increment else nbytes * factor, nbytes


def shapes(
    op: str, dtype: str, sweep: Sequence[int], tokens: Sequence[int], hidden_sizes: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the shapes to measure in one dtype, without duplicates.

    Args:
        op: one of `OPS`.
        dtype: one of `comm_core.types.DTYPES`.
        sweep: sizes in bytes, rounded down to whole elements, or to whole rows for the fused operation.
        tokens: numbers of rows; if not empty, they replace the sweep.
        hidden_sizes: numbers of elements in a row.
    """
    itemsize = DTYPES[dtype]
    if tokens:
        found: list[tuple[int, ...]] = [(rows, width) for width in hidden_sizes for rows in tokens]
    elif op == "all_reduce":
        found = [(nbytes // itemsize,) for nbytes in sweep]
    else:
        found = [(nbytes // (width * itemsize), width) for width in hidden_sizes for nbytes in sweep]
    return list(dict.fromkeys(shape for shape in found if math.prod(shape)))
