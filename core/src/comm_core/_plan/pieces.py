"""The routes of a deterministic group: a message that is too large for a backend goes to it in pieces. Pure.

The backends of such a group, and the terminal fallback, sum alike (`Available.numerics`), so any of them may serve a
plain sum. A norm's bits differ between backends: all messages with rows of one length go to one of them, in both modes.
Its quantisation has the same bits everywhere, so a backend quantises what it norms, and core the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from comm_core.types import DTYPES, TERMINAL, Route, Rule

__all__ = ["ALIGNMENT_NBYTES", "in_pieces"]

#: Hooks get tensors at multiples of this address, in bytes, so pieces begin at multiples of it.
ALIGNMENT_NBYTES = 16


def in_pieces(routes: Sequence[Route]) -> tuple[Route, ...]:
    """Return the routes of a deterministic group, made from those of a group that isn't."""
    fused = {
        (route.mode, route.device_type, route.dtype): _fused(route, routes)
        for route in routes
        if route.op == "all_reduce_add_rms_norm"
    }
    made = []
    for route in routes:
        if route.op == "all_reduce":
            made.append(_plain(route))
            continue
        normed = fused[route.mode, route.device_type, route.dtype]
        made.append(normed if route.op == normed.op else _quantized(route, normed))
    return tuple(made)


def _plain(route: Route) -> Route:
    """Add a rule that takes messages in pieces: that of the rule with the largest messages."""
    limited = [rule for rule in route.rules if rule.backend != TERMINAL]
    pieces = [piece for rule in limited if (piece := _piece_of(rule, DTYPES[route.dtype])) is not None]
    if not pieces:
        return route
    largest = max(pieces, key=lambda piece: piece.piece_nbytes or 0)  # the first one of equal size
    return dataclasses.replace(route, rules=(*route.rules[:-1], largest, route.rules[-1]))


def _fused(route: Route, routes: Sequence[Route]) -> Route:
    """Keep the rules that take all messages of a row's length, as a whole or in pieces, in both modes."""
    same = [other for other in routes if _kind(other) == _kind(route)]
    # In the order of one mode: tuned priorities may differ between modes.
    in_all = set.intersection(*({_bounds(rule) for rule in other.rules} for other in same))
    itemsize = DTYPES[route.dtype]
    rules: list[Rule] = []
    for rule in same[0].rules:
        row_step = rule.hidden_multiple * itemsize
        if (
            rule.backend == TERMINAL
            or _bounds(rule) not in in_all
            or rule.min_nbytes > row_step
            or rule.max_tokens is not None
            or row_step % math.lcm(rule.multiple_nbytes, ALIGNMENT_NBYTES)
        ):
            continue
        if rule.max_nbytes is None:
            rules.append(rule)
        elif rule.max_nbytes >= row_step:
            # A message of one row that is longer than a piece has no rule here, and neither has one of several.
            rules += [rule, dataclasses.replace(rule, max_nbytes=None, piece_nbytes=rule.max_nbytes)]
    return dataclasses.replace(route, rules=(*rules, Rule(TERMINAL)))


def _quantized(route: Route, fused: Route) -> Route:
    """Keep the messages that a backend takes whole, if the fused call's route gives them to it: the norm is the same.

    Only the first backend of that route has such messages, since others norm only what it leaves. The rest is composed.
    """
    name = fused.rules[0].backend
    norms = itertools.takewhile(lambda rule: rule.backend == name != TERMINAL, fused.rules)
    pairs = itertools.product(norms, route.rules)
    rules = [both for norm, rule in pairs if rule.backend == name and (both := _intersect(rule, norm)) is not None]
    return dataclasses.replace(route, rules=(*rules, Rule(TERMINAL)))


def _intersect(rule: Rule, norm: Rule) -> Rule | None:
    """Return the rule for what both take as a whole; None if there is nothing."""
    highs = [high for high in (rule.max_nbytes, norm.max_nbytes) if high is not None]
    low, high = max(rule.min_nbytes, norm.min_nbytes), min(highs, default=None)
    if norm.piece_nbytes is not None or (high is not None and high < low):
        return None
    return dataclasses.replace(
        rule,
        min_nbytes=low,
        max_nbytes=high,
        multiple_nbytes=math.lcm(rule.multiple_nbytes, norm.multiple_nbytes),
        hidden_multiple=math.lcm(rule.hidden_multiple, norm.hidden_multiple),
    )


def _piece_of(rule: Rule, itemsize: int) -> Rule | None:
    """Return the rule that takes larger messages in pieces; None if `rule` has no limit, or can't take every piece."""
    step = math.lcm(itemsize, rule.multiple_nbytes)
    if rule.max_nbytes is None or rule.min_nbytes > step or rule.piece_nbytes is not None:
        return None
    aligned = math.lcm(step, ALIGNMENT_NBYTES)
    nbytes = rule.max_nbytes // aligned * aligned
    return dataclasses.replace(rule, max_nbytes=None, piece_nbytes=nbytes) if nbytes else None


def _kind(route: Route) -> tuple[str, str, str]:
    """Return what routes of two modes have in common."""
    return route.op, route.device_type, route.dtype


def _bounds(rule: Rule) -> tuple[str, int, int | None, int, int | None, int]:
    return (
        rule.backend,
        rule.min_nbytes,
        rule.max_nbytes,
        rule.multiple_nbytes,
        rule.max_tokens,
        rule.hidden_multiple,
    )
