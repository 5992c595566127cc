"""The answers of the backends: encoded for the exchange between ranks, and merged to one. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from comm_core._plan.routes import Offer
from comm_core.errors import CommError
from comm_core.types import MAX_RANGES, OPS, Available, Range, Unavailable

__all__ = [
    "encode_answer",
    "encode_prepared",
    "merge_answers",
    "merge_prepared",
    "once_prepared",
    "with_explicit_ranges",
]

# The most ranges of merged answers: ranks that differ have a few ranges each, and without a limit their pairs multiply.
_MAX_MERGED_RANGES = 4 * MAX_RANGES


def encode_answer(answer: Available | Unavailable | str) -> dict[str, Any]:
    """Return an answer of `is_available` as JSON; a string is the reason why the hook gave none."""
    if isinstance(answer, Available):
        ranges = [item.to_json() for item in answer.ranges]
        return {
            "priority": answer.priority,
            "ranges": ranges,
            "checks_operands": answer.checks_operands,
            "numerics": answer.numerics,
        }
    return {"reason": answer.reason if isinstance(answer, Unavailable) else answer}


def _decode(data: Mapping[str, Any]) -> Available:
    """Return the `Available` that `encode_answer` encoded."""
    ranges = tuple(map(Range.from_json, data["ranges"]))
    return Available(data["priority"], ranges, data["checks_operands"], data["numerics"])


def merge_answers(answers: Sequence[Mapping[str, Any]]) -> Available | tuple[str, int | None]:
    """Merge all ranks' answers of one backend to the lowest priority and the intersection of the ranges.

    Args:
        answers: the encoded answers by group rank.

    Returns:
        The merged answer; or, if a rank refuses, its reason and group rank, None for all ranks.
    """
    for rank, answer in enumerate(answers):
        if "reason" in answer:
            everywhere = all(other == answer for other in answers)
            return answer["reason"], None if everywhere else rank
    first = _decode(answers[0])
    if all(answer == answers[0] for answer in answers):
        return first
    priority, ranges, checks_operands = first.priority, first.ranges, first.checks_operands
    numerics = first.numerics
    # Each distinct answer once: thousands of ranks give only a few.
    for answer in {json.dumps(answer, sort_keys=True): answer for answer in answers}.values():
        other = _decode(answer)
        priority = min(priority, other.priority)
        checks_operands = checks_operands and other.checks_operands
        numerics = numerics if other.numerics == numerics else ""
        pairs = (one.intersect(two) for one in ranges for two in other.ranges)
        ranges = tuple(dict.fromkeys(both for both in pairs if both is not None))
        if len(ranges) > _MAX_MERGED_RANGES:
            return f"the ranks' answers differ and have more than {_MAX_MERGED_RANGES} ranges in common", None
    if not ranges:
        return "the ranks' answers have no range in common", None
    return Available(priority, ranges, checks_operands, numerics)


def encode_prepared(ranges: Sequence[Range], priority: int, hooks: Sequence[str]) -> dict[str, Any]:
    """Return the answer of `pre_capture_init` as JSON, for the exchange between ranks.

    Args:
        ranges: the ranges that it returned.
        priority: the backend's priority.
        hooks: the names of the plugin's hooks.

    Raises:
        TypeError, ValueError, CommError: the ranges are invalid.
    """
    if not ranges:
        raise ValueError("pre_capture_init returned no ranges; expected at least one, or None to leave them unchanged")
    answer = with_explicit_ranges(Available(priority, once_prepared(ranges)), hooks, "pre_capture_init")
    if isinstance(answer, Unavailable):
        raise CommError(answer.reason)
    return encode_answer(answer)


def merge_prepared(offer: Offer, answers: Sequence[Mapping[str, Any] | None]) -> Available | tuple[str, int | None]:
    """Merge all ranks' answers of `pre_capture_init` to the one that holds from now on; see `merge_answers`.

    Args:
        offer: the backend's offer so far.
        answers: the encoded answers by group rank; None for unchanged.
    """
    unchanged = encode_answer(Available(offer.priority, offer.ranges))
    return merge_answers([unchanged if answer is None else answer for answer in answers])


def with_explicit_ranges(
    answer: Available, hooks: Sequence[str], asked: str = "is_available"
) -> Available | Unavailable:
    """Return an answer with explicit ranges, or `Unavailable` if the plugin lacks the hook of one of them.

    Args:
        answer: the answer of a hook; no ranges means every operation that the plugin implements.
        hooks: the names of the plugin's hooks.
        asked: the name of the hook that returned the answer.
    """
    if len(answer.ranges) > MAX_RANGES:
        return Unavailable(f"{asked} returned {len(answer.ranges)} ranges; the limit is {MAX_RANGES}")
    ops = [op for op in OPS if op in hooks]
    missing = sorted({item.op for item in answer.ranges} - set(ops))
    if missing:
        return Unavailable(f"{asked} names ranges of {', '.join(missing)}, which the plugin doesn't implement")
    return dataclasses.replace(answer, ranges=answer.ranges or tuple(Range(op) for op in ops))


def once_prepared(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Return the ranges with `prepared` unset, as after their preparation."""
    return tuple(dataclasses.replace(item, prepared=False) for item in ranges)
