"""Made-up messages, ranges and offers for the property tests, and what a range takes, spelt out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from comm_core._plan.routes import Offer
from comm_core.types import DTYPES, MODES, OPS, TERMINAL, Range
from hypothesis import strategies as st

DEVICE_TYPES = ("cuda", "cpu")


@dataclasses.dataclass(frozen=True)
class Message:
    op: str
    mode: str
    device_type: str
    dtype: str
    nbytes: int
    num_tokens: int = 1
    hidden_size: int = 0


def takes(item: Range, message: Message) -> bool:
    """Whether a range takes a message: every condition of its documentation, one by one."""
    conditions = [
        item.op == message.op,
        item.modes is None or message.mode in item.modes,
        item.device_types is None or message.device_type in item.device_types,
        item.dtypes is None or message.dtype in item.dtypes,
        message.nbytes >= item.min_nbytes,
        item.max_nbytes is None or message.nbytes <= item.max_nbytes,
        message.nbytes % item.multiple_nbytes == 0,
        item.max_tokens is None or message.num_tokens <= item.max_tokens,
        message.hidden_size % item.hidden_multiple == 0,
    ]
    return all(conditions)


def serves(offers: Sequence[Offer], message: Message) -> str:
    """The first offer, in order, with a range that takes the message now; else the terminal fallback."""
    for offer in offers:
        if any(takes(item, message) and not item.prepared for item in offer.ranges):
            return offer.name
    return TERMINAL


def subsets(names: Sequence[str]) -> st.SearchStrategy[tuple[str, ...] | None]:
    return st.none() | st.lists(st.sampled_from(list(names)), min_size=1, unique=True).map(tuple)


@st.composite
def ranges(draw: st.DrawFn, largest: int = 1 << 14, *, prepared: bool = True) -> Range:
    low = draw(st.integers(0, largest))
    op = draw(st.sampled_from(OPS))
    fused = op != "all_reduce"
    return Range(
        op,
        modes=draw(subsets(MODES)),
        dtypes=draw(subsets(list(DTYPES))),
        device_types=draw(subsets(DEVICE_TYPES)),
        min_nbytes=low,
        max_nbytes=draw(st.none() | st.integers(low, 2 * largest)),
        multiple_nbytes=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 48])),
        max_tokens=draw(st.none() | st.integers(1, 64)) if fused else None,
        hidden_multiple=draw(st.sampled_from([1, 2, 3, 8, 64])) if fused else 1,
        prepared=draw(st.booleans()) if prepared else False,
    )


@st.composite
def offers(draw: st.DrawFn, largest: int = 1 << 14, *, most: int = 5) -> tuple[Offer, ...]:
    """Backends in the order in which they are preferred."""
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=most))
    made = [
        Offer(name, draw(st.integers(1, 999)), tuple(draw(st.lists(ranges(largest), min_size=1, max_size=4))), "1")
        for name in names
    ]
    return tuple(sorted(made, key=lambda offer: (-offer.priority, offer.name)))


@st.composite
def messages(draw: st.DrawFn, near: Sequence[Range], op: str | None = None) -> Message:
    """A message that exists, with a preference for the edges of these ranges, one element to either side of them."""
    op = op or draw(st.sampled_from(OPS))
    fused = op != "all_reduce"
    dtype = draw(st.sampled_from([name for name in DTYPES if "float" in name or not fused]))
    itemsize = DTYPES[dtype]
    device_type = draw(st.sampled_from(DEVICE_TYPES))
    mode = draw(st.sampled_from(MODES)) if device_type == "cuda" else "eager"
    if fused:
        tokens = [edge + off for item in near if (edge := item.max_tokens) for off in (0, 1)]
        num_tokens = draw(st.sampled_from(tokens) | st.integers(1, 80) if tokens else st.integers(1, 80))
        hidden_size = draw(st.sampled_from([1, 2, 3, 6, 8, 24, 64, 192, 193]))
        return Message(op, mode, device_type, dtype, num_tokens * hidden_size * itemsize, num_tokens, hidden_size)
    edges = [edge for item in near for edge in (item.min_nbytes, item.max_nbytes) if edge is not None]
    numels = sorted({max(edge // itemsize + off, 1) for edge in edges for off in (-1, 0, 1)})
    numel = draw(st.sampled_from(numels) | st.integers(1, 1 << 16) if numels else st.integers(1, 1 << 16))
    return Message(op, mode, device_type, dtype, numel * itemsize)


def backwards(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping in the reverse order."""
    return {name: mapping[name] for name in reversed(list(mapping))}
