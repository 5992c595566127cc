"""What is measured: sizes, dtypes, and the arithmetic by which a chain of calls stays exact. Pure, without torch.

A chain feeds each call's output to the next one. Over `world_size` ranks a chain of sums multiplies by `world_size` at
every step, so that it leaves the dtype sooner or later: `chain_length` says after how many calls it has to start anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from comm_core.types import DTYPES

__all__ = [
    "ALIASES",
    "PLACES",
    "BenchCase",
    "Pattern",
    "bus_factor",
    "calls_for",
    "fused_start",
    "parse_nbytes",
    "pattern_of",
    "shapes",
    "sizes",
]

#: nccl-tests' names of dtypes that torch calls otherwise.
ALIASES = {"half": "float16", "float": "float32", "double": "float64"}
#: Where a call's output goes: a new tensor, or the input's own memory (of the fused operation: the residual's).
PLACES = ("out", "in")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Bits of the significand with its leading one, and the exponents of the smallest and largest normal numbers.
_FLOATS = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}
_INTEGERS = {"int64": 63, "int32": 31, "int16": 15, "int8": 7, "uint8": 8}
# Calls that a fused chain should have, where the digits allow them.
_FEW = 8
# Inputs are integers from 0 to this where the world size is a power of two, so that sums only change their exponent.
_LARGEST = 7
# A timed chain moves about this many bytes a rank, within these numbers of calls: long enough that what surrounds it (a
# graph's launch, an event) is a small part, short enough that a table takes minutes.
_CHAIN_NBYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_CALLS = {"cuda": (10, 200), "cpu": (3, 200)}


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One kind of call, which every contender that takes it is timed on.

    Attributes:
        op: one of `comm_core.types.OPS`.
        mode: "eager" or "graph".
        place: one of `PLACES`.
        dtype: one of `comm_core.types.DTYPES`.
        device_type: "cuda" or "cpu".
        shape: of the tensor that is reduced: `[numel]`, or `[num_tokens, hidden_size]`.
    """

    op: str
    mode: str
    place: str
    dtype: str
    device_type: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that is reduced."""
        return self.count * DTYPES[self.dtype]

    @property
    def fused(self) -> bool:
        """Whether the call also adds a residual and normalises."""
        return self.op != "all_reduce"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The values that a chain starts from, and how far they carry.

    A rank's element is an integer from 0 to `largest`, times two to the power of `exponent`; the integers differ
    between ranks. Where `alone`, only one rank's is not zero, since the dtype couldn't hold the sum of more.

    Attributes:
        largest: the largest integer.
        exponent: of the scale.
        alone: whether each element comes from one rank alone.
        length: calls after which a chain has to start anew, for every value on the way to be exact.
    """

    largest: int
    exponent: int
    alone: bool
    length: int


def pattern_of(op: str, dtype: str, world_size: int) -> Pattern:
    """How a chain of `op` starts in a group of `world_size` ranks, and for how many calls it stays exact.

    A plain sum over ranks that hold the same value multiplies by `world_size`. A power of two only raises the exponent;
    an odd factor also takes digits of the significand.

    The fused operation starts from one magnitude on each rank, see `fused_start`, and keeps to one: after the first
    call the sum's elements are ±s, the normed ones ±1, and each further call adds `world_size` to s.

    Raises:
        ValueError: a group of one rank has nothing to reduce.
    """
    if world_size < 2:
        raise ValueError("an all-reduce takes two ranks or more")
    if op != "all_reduce":
        most = 1 << _FLOATS[dtype][0]
        # As distinct as the digits allow.
        largest = next(
            (each for each in (world_size, 2) if fused_start(world_size, each) + world_size * _FEW < most), 1
        )
        length = max((most - fused_start(world_size, largest)) // world_size, 1)
        return Pattern(largest, 0, alone=False, length=length)
    odd = world_size
    while odd % 2 == 0:
        odd //= 2
    if dtype in _INTEGERS:
        bits, exponent, room = _INTEGERS[dtype], 0, _INTEGERS[dtype]
        odd = 1  # nothing is rounded: only the range ends
    else:
        bits, lowest, highest = _FLOATS[dtype]
        exponent, room = lowest, highest - lowest
    wanted = _LARGEST if odd == 1 else 1
    alone = world_size * world_size > 1 << bits
    terms = 1 if alone else world_size
    largest = max(1, min(wanted, (1 << bits) // (terms * world_size)))
    length = 1
    # Before one more call: its partial sums need the digits, its result the range.
    while (
        largest * terms * world_size * odd**length <= 1 << bits or odd == 1
    ) and largest * terms * world_size**length < 1 << room:
        length += 1
    return Pattern(largest, exponent, alone, length)


def fused_start(world_size: int, largest: int) -> int:
    """The magnitude of a fused chain's first sum: 1 to `largest` and anew over the ranks, and 1 of the residual."""
    return sum(rank % largest + 1 for rank in range(world_size)) + 1


def calls_for(device_type: str, nbytes: int) -> int:
    """How many calls a timed chain has where nobody says otherwise."""
    low, high = _CALLS[device_type]
    return max(low, min(high, _CHAIN_NBYTES[device_type] // max(nbytes, 1)))


def bus_factor(world_size: int) -> float:
    """What a message's bytes over its time are multiplied by for bus bandwidth, as nccl-tests define it: 2(n-1)/n."""
    return 2 * (world_size - 1) / world_size


def parse_nbytes(text: str) -> int:
    """Bytes from nccl-tests' notation: "8", "64K", "1M", "2G".

    Raises:
        ValueError: it is none.
    """
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdecimal():
        raise ValueError(f"{text!r} is no number of bytes such as 8, 64K, 1M or 2G")
    return int(number) * _UNITS[unit]


def sizes(first: int, last: int, factor: int, increment: int) -> Iterator[int]:
    """The sizes of a sweep, in bytes: by `increment` where it isn't 0, else by `factor`."""
    nbytes, before = first, -1
    while before < nbytes <= last:
        yield nbytes
        nbytes, before = nbytes + increment if increment else nbytes * factor, nbytes


def shapes(
    op: str, dtype: str, sweep: Sequence[int], tokens: Sequence[int], hidden_sizes: Sequence[int]
) -> list[tuple[int, ...]]:
    """The shapes that are measured in one dtype, each once.

    Args:
        op: one of `comm_core.types.OPS`.
        dtype: one of `comm_core.types.DTYPES`.
        sweep: sizes in bytes, rounded down to whole elements, or rows for the fused operation.
        tokens: rows; where given, they replace the sweep.
        hidden_sizes: elements a row.
    """
    itemsize = DTYPES[dtype]
    if tokens:
        found: list[tuple[int, ...]] = [(rows, width) for width in hidden_sizes for rows in tokens]
    elif op == "all_reduce":
        found = [(nbytes // itemsize,) for nbytes in sweep]
    else:
        found = [(nbytes // (width * itemsize), width) for width in hidden_sizes for nbytes in sweep]
    return list(dict.fromkeys(shape for shape in found if math.prod(shape)))
