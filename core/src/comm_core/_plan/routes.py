"""Plan the routes: from the backends' offers, in order, to one route for each kind of message. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from comm_core.tuning import TuningRule
from comm_core.types import DTYPES, MODES, OPS, TERMINAL, Range, Route, Rule

__all__ = ["Cell", "Offer", "cells", "exclude_cells", "owned_cells", "owned_intervals", "owners", "plan_routes"]

#: A kind of message: (operation, mode, device type, dtype).
Cell = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Offer:
    """The ranges that one candidate may still serve.

    Attributes:
        name: the backend's name.
        priority: the backend's priority; higher ones are preferred.
        ranges: the ranges it serves.
        version: the version of its distribution.
        checks_operands, numerics: see `Available`.
    """

    name: str
    priority: int
    ranges: tuple[Range, ...]
    version: str | None = None
    checks_operands: bool = False
    numerics: str = ""


def cells(device_types: Iterable[str]) -> tuple[Cell, ...]:
    """Return every kind of message that a group with these device types may reduce."""
    return tuple(
        (op, mode, device_type, dtype)
        for op, mode, device_type, dtype in itertools.product(OPS, MODES, device_types, DTYPES)
        # Graphs exist only on CUDA; a norm needs floats.
        if (mode == "eager" or device_type == "cuda") and (op == "all_reduce" or "float" in dtype)
    )


def plan_routes(
    offers: Sequence[Offer], device_types: Iterable[str], tuning: Sequence[TuningRule] = (), wire: str = ""
) -> tuple[Route, ...]:
    """Return a route for each kind of message: the offers' rules in order, then the terminal fallback's.

    Args:
        offers: the offers, the most preferred first, without the terminal fallback.
        device_types: the device types of the group's tensors.
        tuning: rules that override the offers' priorities.
        wire: the quantised wire that the group asks for; "": none.
    """
    return tuple(Route(*cell, rules=_rules(offers, cell, tuning, wire)) for cell in cells(device_types))


def owners(routes: Iterable[Route]) -> set[str]:
    """Return the backends that own a part of some route, without the terminal fallback."""
    return {rule.backend for route in routes for rule in route.rules} - {TERMINAL}


def owned_cells(routes: Iterable[Route], name: str) -> set[Cell]:
    """Return the kinds of message of which the backend `name` owns a part."""
    return {
        (route.op, route.mode, route.device_type, route.dtype)
        for route in routes
        if any(rule.backend == name for rule in route.rules)
    }


def owned_intervals(route: Route, index: int) -> tuple[tuple[int, int | None], ...]:
    """Return the intervals of sizes, (lowest, highest) in bytes, that rule `index` takes and no earlier rule covers.

    Both ends are sizes that the rule takes: multiples of the dtype's size and of `multiple_nbytes`. A highest of None
    means no upper bound.
    """
    return _uncovered_intervals(route.rules[index], route.rules[:index], DTYPES[route.dtype])


def exclude_cells(ranges: Iterable[Range], excluded: set[Cell], device_types: Sequence[str]) -> tuple[Range, ...]:
    """Return the ranges without the kinds of message in `excluded`."""
    kept = []
    for item in ranges:
        served = [c for c in cells(device_types) if c[0] == item.op and item.serves(*c[1:])]
        if not excluded.intersection(served):
            kept.append(item)
            continue
        left = [cell for cell in served if cell not in excluded]
        for (mode, device_type), group in itertools.groupby(left, key=lambda cell: cell[1:3]):
            dtypes = tuple(cell[3] for cell in group)
            kept.append(dataclasses.replace(item, modes=(mode,), device_types=(device_type,), dtypes=dtypes))
    return tuple(kept)


# The terminal fallback, to be given a score by tuning rules.
_TERMINAL_OFFER = Offer(TERMINAL, 0, tuple(map(Range, OPS)))


def _rules(offers: Sequence[Offer], cell: Cell, tuning: Sequence[TuningRule], wire: str) -> tuple[Rule, ...]:
    op, mode, device_type, dtype = cell
    scored: list[tuple[float, Rule]] = []
    for offer in (*offers, _TERMINAL_OFFER):
        matching = [each for each in tuning if each.matches(offer.name, op, mode, device_type)]
        for item in offer.ranges:
            is_served = item.op == op and not item.prepared and item.serves(mode, device_type, dtype)
            if is_served and item.wire in ("", wire):
                scored += _scored_rules(offer, item, matching)
    if tuning:  # a stable sort: equal scores keep the offers' order
        scored.sort(key=lambda each: -each[0])
    if wire:  # the group asks for it, so all ranges with it come before the exact ones
        scored.sort(key=lambda each: not each[1].wire)
    rules: list[Rule] = []
    for score, rule in scored:
        if score > 0 and _uncovered_intervals(rule, rules, DTYPES[dtype]):
            rules.append(rule)
    return (*rules, Rule(TERMINAL))


def _scored_rules(offer: Offer, item: Range, tuning: Sequence[TuningRule]) -> list[tuple[float, Rule]]:
    """Return the rules of one range with their scores: one rule for each interval of sizes of one score."""
    multiples = item.multiple_nbytes, item.max_tokens, item.hidden_multiple
    scored: list[tuple[float, Rule]] = []
    left: list[tuple[int, int | None]] = [(item.min_nbytes, item.max_nbytes)]
    for each in reversed(tuning):  # the last one that matches a message counts
        text = str(each)
        for low, high in (both for part in left if (both := _intersect(part, each)) is not None):
            scored.append((each.score, Rule(offer.name, low, high, *multiples, tuned=text, wire=item.wire)))
        left = [part for interval in left for part in _subtract(interval, each)]
    untuned = (Rule(offer.name, low, high, *multiples, wire=item.wire) for low, high in left)
    return [*scored, *((float(offer.priority), rule) for rule in untuned)]


def _intersect(interval: tuple[int, int | None], other: TuningRule) -> tuple[int, int | None] | None:
    """Return the part of the interval that a tuning rule concerns; None if there is none."""
    low = max(interval[0], other.min_nbytes)
    highs = [high for high in (interval[1], other.max_nbytes) if high is not None]
    high = min(highs, default=None)
    return None if high is not None and high < low else (low, high)


def _uncovered_intervals(rule: Rule, earlier: Sequence[Rule], itemsize: int) -> tuple[tuple[int, int | None], ...]:
    """Return the intervals of sizes that `rule` takes and no earlier rule covers, rounded to sizes that messages have.

    The smallest size is one element.
    """
    step = math.lcm(itemsize, rule.multiple_nbytes)
    # In pieces, the backend itself gets no more than one piece.
    left: list[tuple[int, int | None]] = [(rule.min_nbytes, rule.piece_nbytes or rule.max_nbytes)]
    for other in earlier:
        if _covers_within_bounds(other, rule, step):
            left = [part for interval in left for part in _subtract(interval, other)]
    rounded = []
    for low, high in left:
        first = max(-(-low // step), 1) * step
        last = None if high is None else high // step * step
        if last is None or first <= last:
            rounded.append((first, last))
    return tuple(rounded)


def _covers_within_bounds(other: Rule, rule: Rule, step: int) -> bool:
    """Return whether `other` takes every message of `rule` within the size bounds of `other`.

    `step` divides each size of `rule`.
    """
    covers_tokens = other.max_tokens is None or (rule.max_tokens is not None and rule.max_tokens <= other.max_tokens)
    return covers_tokens and step % other.multiple_nbytes == 0 and rule.hidden_multiple % other.hidden_multiple == 0


def _subtract(interval: tuple[int, int | None], other: Rule | TuningRule) -> list[tuple[int, int | None]]:
    """Return the parts of the interval outside the size bounds of `other`."""
    low, high = interval
    parts: list[tuple[int, int | None]] = []
    below = other.min_nbytes - 1
    if below >= low:
        parts.append((low, below if high is None else min(below, high)))
    if other.max_nbytes is not None and (high is None or other.max_nbytes < high):
        parts.append((max(low, other.max_nbytes + 1), high))
    return parts
