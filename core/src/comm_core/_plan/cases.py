"""The messages of the admission test: the edges of every stretch of sizes that a backend would own. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from comm_core._plan.routes import Cell, Offer, owned, owned_cells, owners
from comm_core.types import DTYPES, Route

__all__ = ["AdmissionCase", "admission_cases", "next_to_test", "untestable_cells"]

#: Sizes above this, in bytes, are tested at this size: past it a transfer has left every protocol's edge behind, and
#: the test of nine dtypes stays within seconds on a CPU. For the fused operation an eighth, since it needs fp64.
LARGEST_NBYTES = {"all_reduce": 64 << 20, "all_reduce_add_rms_norm": 8 << 20}
#: A range without an upper end is tested up to this size, in bytes.
UNBOUNDED_NBYTES = 1 << 20
# Elements a row of the fused operation's cases: small enough for many rows at small sizes.
_HIDDEN_SIZE = 1024
# How many neighbours of an edge are looked at for one that another backend doesn't take.
_NEAR = 8
# The largest message, in bytes, that is tested because fewer tokens are another backend's.
_STEPPED_NBYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class AdmissionCase:
    """One message of the admission test.

    Attributes:
        cell: its kind.
        shape: of the tensor; `[num_tokens, hidden_size]` for the fused operation.
    """

    cell: Cell
    shape: tuple[int, ...]


def admission_cases(routes: Iterable[Route], name: str) -> tuple[AdmissionCase, ...]:
    """The messages with which the backend `name` is tested: both edges of every stretch of sizes that it owns."""
    found: dict[AdmissionCase, None] = {}
    for route in routes:
        cell = (route.op, route.mode, route.device_type, route.dtype)
        for index, rule in enumerate(route.rules):
            if rule.backend != name:
                continue
            for low, high in owned(route, index):
                top = max(low, UNBOUNDED_NBYTES) if high is None else min(high, max(low, LARGEST_NBYTES[route.op]))
                for shapes in (_upwards(route, index, low), _downwards(route, index, top)):
                    shape = next((shape for shape in shapes if _goes_to(route, shape, name)), None)
                    if shape is not None:
                        found[AdmissionCase(cell, shape)] = None
    return tuple(found)


def untestable_cells(routes: Iterable[Route], name: str) -> set[Cell]:
    """The kinds of message of which the backend `name` would own a part, but no size that can be tested."""
    routes = tuple(routes)
    return owned_cells(routes, name) - {case.cell for case in admission_cases(routes, name)}


def next_to_test(
    offers: Iterable[Offer], routes: Iterable[Route], tested: Mapping[str, Collection[AdmissionCase]]
) -> tuple[str | None, list[AdmissionCase]]:
    """The backend to connect or test next, best first, and its untested cases; None once all were tested.

    Args:
        offers: in the order in which they are preferred.
        routes: planned from them.
        tested: the cases that each connected backend has gone through.
    """
    routes = tuple(routes)
    owning = owners(routes)
    for name in (offer.name for offer in offers if offer.name in owning):
        todo = [case for case in admission_cases(routes, name) if case not in tested.get(name, ())]
        if todo or name not in tested:
            return name, todo
    return None, []


def _upwards(route: Route, index: int, low: int) -> Iterator[tuple[int, ...]]:
    """Shapes that rule `index` may own, the first the smallest of at least `low` bytes, a multiple of the rule's.

    Another rule can take the nearest ones without taking the whole stretch: the multiples of a larger number, or fewer
    tokens. Its share is stepped over.
    """
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if route.op == "all_reduce":
        yield from (((low + near * step) // itemsize,) for near in range(_NEAR))
        return
    beyond = [other.max_tokens + 1 for other in route.rules[:index] if other.max_tokens is not None]
    for hidden_size, unit in _rows(route, index):
        row = hidden_size * itemsize
        stepped = (count for count in sorted(beyond) if low < count * row <= _STEPPED_NBYTES)
        for num_tokens in (-(-low // row), *stepped):
            yield -(-num_tokens // unit) * unit, hidden_size


def _downwards(route: Route, index: int, top: int) -> Iterator[tuple[int, ...]]:
    """Shapes that rule `index` may own, the first the largest of at most `top` bytes; see `_upwards`."""
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if route.op == "all_reduce":
        last = top // step * step
        yield from (((last - near * step) // itemsize,) for near in range(min(_NEAR, last // step)))
        return
    for hidden_size, unit in _rows(route, index):
        num_tokens = top // (hidden_size * itemsize)
        num_tokens = min(num_tokens, rule.max_tokens or num_tokens) // unit * unit
        if num_tokens:
            yield num_tokens, hidden_size


def _rows(route: Route, index: int) -> Iterator[tuple[int, int]]:
    """Hidden sizes that rule `index` takes, and of how many rows each makes a multiple of the rule's bytes."""
    rule, itemsize = route.rules[index], DTYPES[route.dtype]
    base = -(-_HIDDEN_SIZE // rule.hidden_multiple) * rule.hidden_multiple
    for near in range(_NEAR):
        hidden_size = base + near * rule.hidden_multiple
        yield hidden_size, rule.multiple_nbytes // math.gcd(rule.multiple_nbytes, hidden_size * itemsize)


def _goes_to(route: Route, shape: tuple[int, ...], name: str) -> bool:
    nbytes = math.prod(shape) * DTYPES[route.dtype]
    if route.op == "all_reduce":
        return route.backend_for(nbytes) == name
    return route.backend_for(nbytes, *shape) == name
