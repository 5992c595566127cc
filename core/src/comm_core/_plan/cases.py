"""The messages of the admission test: both ends of every interval of sizes that a backend would own. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from comm_core._plan.routes import Cell, Offer, owned_cells, owned_intervals, owners
from comm_core.types import DTYPES, Route

__all__ = ["AdmissionCase", "admission_cases", "next_to_test", "untestable_cells"]

#: The largest size that is tested, in bytes, by operation. No protocol changes above it, and the test of nine dtypes
#: takes only seconds on a CPU. The fused operation has an eighth, because its test computes in fp64.
LARGEST_NBYTES = {"all_reduce": 64 << 20, "all_reduce_add_rms_norm": 8 << 20}
#: The largest size, in bytes, that is tested of a range without an upper bound.
UNBOUNDED_NBYTES = 1 << 20
# Elements a row in the fused operation's cases, rounded up to a rule's multiple: small sizes then have many rows.
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
        shape: the tensor's shape; `[num_tokens, hidden_size]` for the fused operation.
    """

    cell: Cell
    shape: tuple[int, ...]


def admission_cases(routes: Iterable[Route], name: str) -> tuple[AdmissionCase, ...]:
    """Return the cases that test the backend `name`: both ends of every interval of sizes that it owns."""
    cases: dict[AdmissionCase, None] = {}
    for route in routes:
        cell = (route.op, route.mode, route.device_type, route.dtype)
        for index, rule in enumerate(route.rules):
            if rule.backend != name:
                continue
            for low, high in owned_intervals(route, index):
                top = max(low, UNBOUNDED_NBYTES) if high is None else min(high, max(low, LARGEST_NBYTES[route.op]))
                for shapes in (_shapes_from(route, index, low), _shapes_down_from(route, index, top)):
                    shape = next((shape for shape in shapes if _is_served_by(route, shape, name)), None)
                    if shape is not None:
                        cases[AdmissionCase(cell, shape)] = None
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


def _hidden_sizes(route: Route, index: int) -> Iterator[tuple[int, int]]:
    """Yield hidden sizes that rule `index` takes, each with the row count whose multiples meet `multiple_nbytes`."""
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    base = -(-_BASE_HIDDEN_SIZE // rule.hidden_multiple) * rule.hidden_multiple
    for near in range(_MAX_NEIGHBOURS):
        hidden_size = base + near * rule.hidden_multiple
        yield hidden_size, rule.multiple_nbytes // math.gcd(rule.multiple_nbytes, hidden_size * itemsize)


def _is_served_by(route: Route, shape: tuple[int, ...], name: str) -> bool:
    nbytes = math.prod(shape) * DTYPES[route.dtype]
    if route.op == "all_reduce":
        return route.backend_for(nbytes) == name
    return route.backend_for(nbytes, *shape) == name
