"""The messages of the admission test: both ends of each interval of sizes that a backend would own, and odd ones. Pure.

A kernel moves vectors of several elements, and what is left at the end of an odd message by other code. That code is
tested where the message is small, large, and between.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from comm_core._plan.routes import Cell, Offer, owned_cells, owned_intervals, owners
from comm_core.types import DTYPES, Route, Rule

__all__ = ["AdmissionCase", "admission_cases", "next_to_test", "untestable_cells"]

#: The largest size that is tested, in bytes, by operation. No protocol changes above it, and the test of nine dtypes
#: takes only seconds on a CPU. Fused operations have an eighth, because their tests compute in fp64.
LARGEST_NBYTES = {"all_reduce": 64 << 20, "all_reduce_add_rms_norm": 8 << 20, "all_reduce_add_rms_norm_quant": 8 << 20}
#: The largest size, in bytes, that is tested of a range without an upper bound.
UNBOUNDED_NBYTES = 1 << 20
#: The largest odd size that is tested, in bytes: a message that ends in the middle of a vector.
LARGEST_ODD_NBYTES = 1 << 20
# Elements a row in the fused operations' cases, rounded up to a rule's multiple: small sizes then have many rows.
_BASE_HIDDEN_SIZE = 1024
# The number of sizes or shapes tried next to an interval's end, until no other backend takes one.
_MAX_NEIGHBOURS = 8
# The largest message, in bytes, that is tried after skipping the token counts that another backend takes.
_MAX_SKIP_NBYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class AdmissionCase:
    """One message of the admission test.

    Attributes:
        cell: the kind of message.
        shape: the tensor's shape; `[num_tokens, hidden_size]` for the fused operations.
        wire: the quantised wire that it travels by; "": none, and the sum is exact.
    """

    cell: Cell
    shape: tuple[int, ...]
    wire: str = ""


def admission_cases(routes: Iterable[Route], name: str) -> tuple[AdmissionCase, ...]:
    """Return the cases that test the backend `name`: both ends of each interval of sizes that it owns, and odd ones."""
    cases: dict[AdmissionCase, None] = {}
    for route in routes:
        cell = (route.op, route.mode, route.device_type, route.dtype)
        for index, rule in enumerate(route.rules):
            if rule.backend != name:
                continue
            for interval in owned_intervals(route, index):
                for shape in _shapes_in(route, index, interval):
                    cases[AdmissionCase(cell, shape, _rule_of(route, shape).wire)] = None
    return tuple(cases)


def untestable_cells(routes: Iterable[Route], name: str) -> set[Cell]:
    """Return the kinds of message of which the backend `name` would own a part, but no size that can be tested."""
    routes = tuple(routes)
    return owned_cells(routes, name) - {case.cell for case in admission_cases(routes, name)}


def next_to_test(
    offers: Iterable[Offer], routes: Iterable[Route], tested: Mapping[str, Collection[AdmissionCase]]
) -> tuple[str | None, list[AdmissionCase]]:
    """Return the most preferred backend to connect or test next, and its untested cases; None if all are tested.

    Args:
        offers: the offers, the most preferred first.
        routes: the routes planned from the offers.
        tested: the cases that have run, by connected backend.
    """
    routes = tuple(routes)
    owning = owners(routes)
    for name in (offer.name for offer in offers if offer.name in owning):
        todo = [case for case in admission_cases(routes, name) if case not in tested.get(name, ())]
        if todo or name not in tested:
            return name, todo
    return None, []


def _shapes_in(route: Route, index: int, interval: tuple[int, int | None]) -> Iterator[tuple[int, ...]]:
    """Yield the shapes that test an interval of sizes which rule `index` owns."""
    low, high = interval
    top = max(low, UNBOUNDED_NBYTES) if high is None else min(high, max(low, LARGEST_NBYTES[route.op]))

    def find(shapes: Iterator[tuple[int, ...]]) -> list[tuple[int, ...]]:
        name = route.rules[index].backend
        return list(itertools.islice((shape for shape in shapes if _is_served_by(route, shape, name)), 1))

    small = find(_odd_shapes_from(route, index, low, top))
    large = find(_odd_shapes_down_from(route, index, max(low, min(top, LARGEST_ODD_NBYTES))))
    between = []
    if small and large:
        mean_nbytes = math.isqrt(math.prod(small[0]) * math.prod(large[0])) * DTYPES[route.dtype]
        between = find(_odd_shapes_from(route, index, mean_nbytes, top))
    first, last = find(_shapes_from(route, index, low)), find(_shapes_down_from(route, index, top))
    yield from (*first, *small, *between, *large, *last)


def _shapes_from(route: Route, index: int, low: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes of at least `low` bytes that rule `index` may own, starting with the smallest.

    An earlier rule may take the first shapes without covering the whole interval: it takes multiples of a larger
    number, or fewer tokens. The later shapes skip those.
    """
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if route.op == "all_reduce":
        yield from (((low + near * step) // itemsize,) for near in range(_MAX_NEIGHBOURS))
        return
    uncovered_counts = [other.max_tokens + 1 for other in route.rules[:index] if other.max_tokens is not None]
    for hidden_size, unit in _hidden_sizes(route, index):
        row = hidden_size * itemsize
        skipping = (count for count in sorted(uncovered_counts) if low < count * row <= _MAX_SKIP_NBYTES)
        for num_tokens in (-(-low // row), *skipping):
            yield -(-num_tokens // unit) * unit, hidden_size


def _shapes_down_from(route: Route, index: int, top: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes of at most `top` bytes that rule `index` may own, starting with the largest; see `_shapes_from`."""
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if route.op == "all_reduce":
        last = top // step * step
        yield from (((last - near * step) // itemsize,) for near in range(min(_MAX_NEIGHBOURS, last // step)))
        return
    for hidden_size, unit in _hidden_sizes(route, index):
        num_tokens = top // (hidden_size * itemsize)
        num_tokens = min(num_tokens, rule.max_tokens or num_tokens) // unit * unit
        if num_tokens:
            yield num_tokens, hidden_size


def _odd_shapes_from(route: Route, index: int, low: int, top: int) -> Iterator[tuple[int, ...]]:
    """Yield odd shapes of at least `low` and at most `top` bytes that rule `index` may own, starting with the smallest.

    Odd are sizes, or rows and their number, that are an odd multiple of the smallest one that the rule takes.
    """
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if route.op == "all_reduce":
        first = -(-low // step) | 1
        yield from ((size // itemsize,) for size in range(first * step, top + 1, 2 * step)[:_MAX_NEIGHBOURS])
        return
    for hidden_size, unit in _odd_hidden_sizes(route, index):
        row = hidden_size * itemsize
        num_tokens = (-(-low // (row * unit)) | 1) * unit
        if num_tokens * row <= top and num_tokens <= (rule.max_tokens or num_tokens):
            yield num_tokens, hidden_size


def _odd_shapes_down_from(route: Route, index: int, top: int) -> Iterator[tuple[int, ...]]:
    """Yield odd shapes of at most `top` bytes that rule `index` may own, the largest first; see `_odd_shapes_from`."""
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if route.op == "all_reduce":
        last = _odd_down(top // step)
        yield from ((size // itemsize,) for size in range(last * step, 0, -2 * step)[:_MAX_NEIGHBOURS])
        return
    for hidden_size, unit in _odd_hidden_sizes(route, index):
        num_tokens = top // (hidden_size * itemsize)
        multiple = _odd_down(min(num_tokens, rule.max_tokens or num_tokens) // unit)
        if multiple > 0:
            yield multiple * unit, hidden_size


def _odd_down(number: int) -> int:
    return number - 1 + number % 2


def _odd_hidden_sizes(route: Route, index: int) -> Iterator[tuple[int, int]]:
    """Yield those of `_hidden_sizes` that are an odd multiple of the rule's `hidden_multiple`."""
    multiple = route.rules[index].hidden_multiple
    return (found for found in _hidden_sizes(route, index) if found[0] // multiple % 2)


def _hidden_sizes(route: Route, index: int) -> Iterator[tuple[int, int]]:
    """Yield hidden sizes that rule `index` takes, each with the row count whose multiples meet `multiple_nbytes`."""
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    base = -(-_BASE_HIDDEN_SIZE // rule.hidden_multiple) * rule.hidden_multiple
    for near in range(_MAX_NEIGHBOURS):
        hidden_size = base + near * rule.hidden_multiple
        yield hidden_size, rule.multiple_nbytes // math.gcd(rule.multiple_nbytes, hidden_size * itemsize)


def _is_served_by(route: Route, shape: tuple[int, ...], name: str) -> bool:
    return _rule_of(route, shape).backend == name


def _rule_of(route: Route, shape: tuple[int, ...]) -> Rule:
    message = (math.prod(shape) * DTYPES[route.dtype], *(() if route.op == "all_reduce" else shape))
    return next(rule for rule in route.rules if rule.takes(*message))
