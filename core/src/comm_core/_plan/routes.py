"""Who serves what: from the offers of the backends, in order, to one route for each kind of message. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from comm_core.types import DTYPES, MODES, OPS, TERMINAL, Range, Route, Rule

__all__ = ["Cell", "Offer", "cells", "narrow", "owned", "owned_cells", "owners", "plan_routes"]

#: One kind of message: (operation, mode, device type, dtype).
Cell = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Offer:
    """What one backend may still serve.

    Attributes:
        name: the backend.
        priority: the higher comes first.
        ranges: what it serves.
        version: of its distribution.
        checks_operands: see `Available`.
    """

    name: str
    priority: int
    ranges: tuple[Range, ...]
    version: str | None = None
    checks_operands: bool = False


def cells(device_types: Iterable[str]) -> tuple[Cell, ...]:
    """Every kind of message that a group of these device types can be asked to reduce."""
    return tuple(
        (op, mode, device_type, dtype)
        for op, mode, device_type, dtype in itertools.product(OPS, MODES, device_types, DTYPES)
        # A graph is CUDA's; a norm needs real numbers.
        if (mode == "eager" or device_type == "cuda") and (op == "all_reduce" or "float" in dtype)
    )


def plan_routes(offers: Sequence[Offer], device_types: Iterable[str]) -> tuple[Route, ...]:
    """A route for each kind of message: of each offer what nobody before it takes; at the end the terminal fallback.

    Args:
        offers: in the order in which they are preferred, without the terminal fallback.
        device_types: of the group's tensors.
    """
    return tuple(Route(*cell, rules=_rules(offers, cell)) for cell in cells(device_types))


def owners(routes: Iterable[Route]) -> set[str]:
    """The backends that own a part of some route, the terminal fallback left out."""
    return {rule.backend for route in routes for rule in route.rules} - {TERMINAL}


def owned_cells(routes: Iterable[Route], name: str) -> set[Cell]:
    """The kinds of message of which the backend `name` owns a part."""
    return {
        (route.op, route.mode, route.device_type, route.dtype)
        for route in routes
        if any(rule.backend == name for rule in route.rules)
    }


def owned(route: Route, index: int) -> tuple[tuple[int, int | None], ...]:
    """The sizes that rule `index` of `route` alone takes, as (lowest, highest) bytes; highest None: any.

    Both ends are sizes that the rule takes: multiples of the dtype's size and of the rule's own.
    """
    return _remainder(route.rules[index], route.rules[:index], DTYPES[route.dtype])


def narrow(ranges: Iterable[Range], wrong: set[Cell], device_types: Sequence[str]) -> tuple[Range, ...]:
    """The ranges without the kinds of message in `wrong`."""
    kept = []
    for item in ranges:
        mine = [c for c in cells(device_types) if c[0] == item.op and item.serves(*c[1:])]
        if not wrong.intersection(mine):
            kept.append(item)
            continue
        left = [cell for cell in mine if cell not in wrong]
        for (mode, device_type), group in itertools.groupby(left, key=lambda cell: cell[1:3]):
            dtypes = tuple(cell[3] for cell in group)
            kept.append(dataclasses.replace(item, modes=(mode,), device_types=(device_type,), dtypes=dtypes))
    return tuple(kept)


def _rules(offers: Sequence[Offer], cell: Cell) -> tuple[Rule, ...]:
    op, mode, device_type, dtype = cell
    rules: list[Rule] = []
    for offer in offers:
        for item in offer.ranges:
            if item.op != op or item.prepared or not item.serves(mode, device_type, dtype):
                continue
            rule = Rule(
                offer.name,
                item.min_nbytes,
                item.max_nbytes,
                item.multiple_nbytes,
                item.max_tokens,
                item.hidden_multiple,
            )
            if _remainder(rule, rules, DTYPES[dtype]):
                rules.append(rule)
    return (*rules, Rule(TERMINAL))


def _remainder(rule: Rule, earlier: Sequence[Rule], itemsize: int) -> tuple[tuple[int, int | None], ...]:
    """What `rule` takes and no rule before it does, rounded to sizes that exist; the smallest is one element."""
    step = math.lcm(itemsize, rule.multiple_nbytes)
    left: list[tuple[int, int | None]] = [(rule.min_nbytes, rule.max_nbytes)]
    for other in earlier:
        if _covers(other, rule, step):
            left = [part for whole in left for part in _cut(whole, other)]
    rounded = []
    for low, high in left:
        first = max(-(-low // step), 1) * step
        last = None if high is None else high // step * step
        if last is None or first <= last:
            rounded.append((first, last))
    return tuple(rounded)


def _covers(other: Rule, rule: Rule, step: int) -> bool:
    """Whether `other` takes all of `rule` within its own bounds of size; `step` divides each size of `rule`."""
    fewer = other.max_tokens is None or (rule.max_tokens is not None and rule.max_tokens <= other.max_tokens)
    return fewer and step % other.multiple_nbytes == 0 and rule.hidden_multiple % other.hidden_multiple == 0


def _cut(whole: tuple[int, int | None], other: Rule) -> list[tuple[int, int | None]]:
    """The interval without the sizes between `other`'s bounds."""
    low, high = whole
    parts: list[tuple[int, int | None]] = []
    below = other.min_nbytes - 1
    if below >= low:
        parts.append((low, below if high is None else min(below, high)))
    if other.max_nbytes is not None and (high is None or other.max_nbytes < high):
        parts.append((max(low, other.max_nbytes + 1), high))
    return parts
