"""The benchmark's sizes and dtypes; its chains stay exact, as sums in the dtype itself show."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from comm_bench.cases import (
    ALIASES,
    OPS,
    BenchCase,
    Pattern,
    bus_factor,
    calls_for,
    first_fused_sum,
    fused_growth,
    parse_nbytes,
    pattern_of,
    shapes,
    sizes,
)
from comm_core.types import DTYPES
from hypothesis import given
from hypothesis import strategies as st

PLAIN, FUSED, *QUANTISED = OPS
FLOATS = [name for name in DTYPES if "float" in name]
INTEGERS = [name for name in DTYPES if "float" not in name]
WORLD_SIZES = range(2, 17)
# A chain of floats may be exact for this many more calls than `length`; a chain of integers for none.
SLACK = 2


def exact(values: torch.Tensor, expected: list[int], exponent: int) -> bool:
    """Return whether a tensor holds exactly these integers times two to the power of `exponent`."""
    scale = Fraction(2) ** exponent
    found = values.tolist()
    return all(math.isfinite(value) for value in found) and all(
        Fraction(value) == number * scale for value, number in zip(found, expected, strict=True)
    )


def sums(pattern: Pattern, world_size: int) -> list[int]:
    """Return possible results of the first call, in units of the scale: the smallest, the largest, some in between."""
    top = pattern.largest * (1 if pattern.disjoint else world_size)
    return sorted({0, 1, top // 3, top // 2, max(top - 2, 0), top - 1, top})


def started(pattern: Pattern, dtype: str, numbers: list[int]) -> torch.Tensor:
    """Return the scaled integers in the dtype, computed in fp64, in which all are exact."""
    values = torch.tensor(numbers, dtype=torch.float64) * 2.0**pattern.exponent
    return values.to(getattr(torch, dtype))


def exact_calls(pattern: Pattern, dtype: str, world_size: int, limit: int) -> int:
    """Return the number of calls, up to `limit`, before a partial sum is rounded or leaves the range.

    After the first call all ranks hold the same values, so any partial sum is a multiple of them, in any order.
    """
    numbers = sums(pattern, world_size)
    values = started(pattern, dtype, numbers)
    for done in range(1, limit):
        partial = torch.zeros_like(values)
        for terms in range(1, world_size + 1):
            partial = partial + values
            if not exact(partial, [number * terms for number in numbers], pattern.exponent):
                return done
        numbers, values = [number * world_size for number in numbers], partial
    return limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_partial_sum_of_a_chain_is_exact_and_the_chain_is_as_long_as_possible(dtype: str) -> None:
    for world_size in WORLD_SIZES:
        pattern = pattern_of(PLAIN, dtype, world_size)
        found = exact_calls(pattern, dtype, world_size, pattern.length + SLACK + 1)
        assert pattern.length <= found <= pattern.length + (SLACK if dtype in FLOATS else 0), (world_size, pattern)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_call_is_exact_in_any_order_of_ranks(dtype: str) -> None:
    for world_size in WORLD_SIZES:
        pattern = pattern_of(PLAIN, dtype, world_size)
        top = pattern.largest * (1 if pattern.disjoint else world_size)
        # The sum of the ranks' integers is one of these.
        numbers = list(range(top + 1))
        assert exact(started(pattern, dtype, numbers), numbers, pattern.exponent), (world_size, pattern)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_value_of_a_chain_is_subnormal(dtype: str) -> None:
    for world_size in WORLD_SIZES:
        smallest = 2.0 ** pattern_of(PLAIN, dtype, world_size).exponent
        assert smallest >= torch.finfo(getattr(torch, dtype)).smallest_normal


@pytest.mark.parametrize("op", [FUSED, QUANTISED[0]])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_partial_sum_of_a_fused_chain_is_exact(dtype: str, op: str) -> None:
    kind = getattr(torch, dtype)
    for world_size in (*range(2, 17), 23, 64):
        pattern = pattern_of(op, dtype, world_size)
        length, first = pattern.length, first_fused_sum(world_size, pattern.largest)
        tensors = sum(1 + rank % pattern.largest for rank in range(world_size))
        assert first == 1 + tensors
        growth = fused_growth(op, world_size, pattern.largest)
        # Every call adds the norms' ones, or again the first call's tensors.
        assert growth == (world_size if op == FUSED else tensors)
        assert pattern.largest > 1 or world_size > 16
        assert exact(torch.arange(first + 1).to(kind), list(range(first + 1)), 0)
        for calls, fine in ((length, True), (length + SLACK, False)):
            # The residual, and the partial sums with the ranks' ones. The last call is enough: for fp64 there are too
            # many integers to loop over.
            last = first + growth * (calls - 1)
            numbers = range(max(last - growth, 0), last + 1)
            found = torch.tensor(list(numbers), dtype=torch.int64).to(kind)
            assert exact(found, list(numbers), 0) == fine, (world_size, calls)


def test_chains_are_longer_if_the_world_size_is_a_power_of_two() -> None:
    lengths = [pattern_of(PLAIN, "bfloat16", world_size).length for world_size in (3, 4, 5, 8)]
    assert lengths[1] > 10 * max(lengths[0], lengths[2])
    assert lengths[3] > 10 * lengths[2]


def test_values_are_disjoint_if_the_dtype_cant_hold_the_ranks_sum() -> None:
    assert pattern_of(PLAIN, "int8", 12).disjoint
    assert not pattern_of(PLAIN, "int8", 11).disjoint
    assert not pattern_of(PLAIN, "bfloat16", 16).disjoint
    assert pattern_of(PLAIN, "bfloat16", 17).disjoint


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("8", 8), ("1K", 1 << 10), ("64k", 64 << 10), ("1M", 1 << 20), ("3m", 3 << 20), ("2G", 2 << 30)],
)
def test_sizes_are_written_as_in_nccl_tests(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "1KB", "1.5K", "-1", "+1", "1 K", "1T", "0x10", "1e3", "²"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="isn't a number of bytes such as 8, 64K, 1M or 2G"):
        parse_nbytes(text)


@given(st.integers(0, 1 << 50), st.sampled_from("KMG"))
def test_units_are_powers_of_1024(number: int, unit: str) -> None:
    power = "KMG".index(unit) + 1
    assert parse_nbytes(f"{number}{unit}") == parse_nbytes(f"{number}{unit.lower()}") == number * 1024**power


def test_aliases_are_torchs_own() -> None:
    assert set(ALIASES) == {"half", "float", "double"}
    for alias, name in ALIASES.items():
        assert name in DTYPES
        assert getattr(torch, alias) is getattr(torch, name)


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 22), st.integers(2, 9))
def test_a_sweep_by_a_factor(first: int, last: int, factor: int) -> None:
    found = list(sizes(first, last, factor, 0))
    assert found == [first * factor**step for step in range(len(found))]
    assert all(nbytes <= last for nbytes in found)
    assert first * factor ** len(found) > last


@given(st.integers(0, 1 << 12), st.integers(0, 1 << 13), st.integers(1, 1 << 12))
def test_a_sweep_by_an_increment(first: int, last: int, increment: int) -> None:
    # With an increment, the factor has no effect.
    assert list(sizes(first, last, 1, increment)) == list(range(first, last + 1, increment))


def test_a_sweep_from_zero_ends() -> None:
    # islice, so that a failure doesn't fill the memory.
    assert len(list(itertools.islice(sizes(0, 1024, 2, 0), 1000))) < 1000


def test_shapes_have_whole_elements_and_no_duplicates() -> None:
    assert shapes(PLAIN, "float32", [1, 4, 6, 8], (), ()) == [(1,), (2,)]
    assert shapes(PLAIN, "int8", [1, 4, 6, 8], (), ()) == [(1,), (4,), (6,), (8,)]
    assert shapes(FUSED, "bfloat16", [64, 128, 200, 512], (), (64,)) == [(1, 64), (4, 64)]
    assert shapes(FUSED, "bfloat16", [256], (), (64, 128)) == [(2, 64), (1, 128)]
    assert shapes(FUSED, "float32", [3], (), (64,)) == []


@pytest.mark.parametrize("op", [PLAIN, FUSED])
def test_tokens_replace_the_sweep(op: str) -> None:
    assert shapes(op, "bfloat16", [1 << 20], (1, 3, 1), (64, 32)) == [(1, 64), (3, 64), (1, 32), (3, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_case_knows_its_bytes(dtype: str) -> None:
    case = BenchCase(FUSED, "eager", "out", dtype, "cpu", (3, 5))
    assert (case.count, case.fused) == (15, True)
    assert case.nbytes == torch.empty(3, 5, dtype=getattr(torch, dtype)).nbytes
    assert not BenchCase(PLAIN, "eager", "out", dtype, "cpu", (3, 5)).fused


def test_bus_bandwidth_is_as_in_nccl_tests() -> None:
    assert [bus_factor(world_size) for world_size in (1, 2, 4, 8)] == [0, 1, 1.5, 1.75]


@given(st.sampled_from(["cuda", "cpu"]), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_longer_messages_have_shorter_chains_within_bounds(device_type: str, one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    assert 200 >= calls_for(device_type, shorter) >= calls_for(device_type, longer) >= 3
