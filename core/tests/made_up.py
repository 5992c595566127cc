"""Made-up messages, ranges and offers for the property tests, and what a range takes, spelt out."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
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


def subset(rng: random.Random, names: Collection[str]) -> tuple[str, ...] | None:
    return None if rng.random() < 0.5 else tuple(rng.sample(list(names), rng.randint(1, len(names))))


def a_range(rng: random.Random, largest: int = 1 << 14, *, prepared: bool = True) -> Range:
    low = rng.choice((0, 1, rng.randint(0, largest), rng.randint(0, largest)))
    op = rng.choice(OPS)
    fused = op != "all_reduce"
    return Range(
        op,
        modes=subset(rng, MODES),
        dtypes=subset(rng, DTYPES),
        device_types=subset(rng, DEVICE_TYPES),
        min_nbytes=low,
        max_nbytes=rng.choice((None, low, rng.randint(low, 2 * largest), rng.randint(low, 2 * largest))),
        multiple_nbytes=rng.choice((1, 2, 3, 4, 6, 8, 16, 48)),
        max_tokens=rng.choice((None, 1, rng.randint(1, 64))) if fused else None,
        hidden_multiple=rng.choice((1, 2, 3, 8, 64)) if fused else 1,
        prepared=prepared and rng.random() < 0.5,
    )


def some_offers(rng: random.Random, largest: int = 1 << 14, *, most: int = 5) -> tuple[Offer, ...]:
    """Backends in the order in which they are preferred."""
    names = rng.sample("abcdefgh", rng.randint(0, most))
    made = [
        Offer(name, rng.randint(1, 999), tuple(a_range(rng, largest) for _ in range(rng.randint(1, 4))), "1")
        for name in names
    ]
    if made and rng.random() < 0.2:  # equal priorities
        made = [dataclasses.replace(offer, priority=made[0].priority) for offer in made]
    return tuple(sorted(made, key=lambda offer: (-offer.priority, offer.name)))


def a_message(rng: random.Random, near: Sequence[Range], op: str | None = None) -> Message:
    """A message that exists, with a preference for the edges of these ranges, one element to either side of them."""
    op = op or rng.choice(OPS)
    fused = op != "all_reduce"
    dtype = rng.choice([name for name in DTYPES if "float" in name or not fused])
    itemsize = DTYPES[dtype]
    device_type = rng.choice(DEVICE_TYPES)
    mode = rng.choice(MODES) if device_type == "cuda" else "eager"
    at_an_edge = rng.random() < 0.5
    if fused:
        tokens = [edge + off for item in near if (edge := item.max_tokens) for off in (0, 1)]
        num_tokens = rng.choice(tokens) if tokens and at_an_edge else rng.randint(1, 80)
        hidden_size = rng.choice((1, 2, 3, 6, 8, 24, 64, 192, 193))
        return Message(op, mode, device_type, dtype, num_tokens * hidden_size * itemsize, num_tokens, hidden_size)
    edges = [edge for item in near for edge in (item.min_nbytes, item.max_nbytes) if edge is not None]
    numels = sorted({max(edge // itemsize + off, 1) for edge in edges for off in (-1, 0, 1)})
    numel = rng.choice(numels) if numels and at_an_edge else rng.randint(1, 1 << 16)
    return Message(op, mode, device_type, dtype, numel * itemsize)


def generators() -> st.SearchStrategy[random.Random]:
    """Random generators with a seed each: Hypothesis draws one number instead of hundreds, which is far cheaper."""
    return st.integers(0, (1 << 64) - 1).map(random.Random)


def ranges(largest: int = 1 << 14, *, prepared: bool = True) -> st.SearchStrategy[Range]:
    return generators().map(lambda rng: a_range(rng, largest, prepared=prepared))


def offers(largest: int = 1 << 14, *, most: int = 5) -> st.SearchStrategy[tuple[Offer, ...]]:
    return generators().map(lambda rng: some_offers(rng, largest, most=most))


def messages(near: Sequence[Range], op: str | None = None) -> st.SearchStrategy[Message]:
    return generators().map(lambda rng: a_message(rng, near, op))


def backwards(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping in the reverse order."""
    return {name: mapping[name] for name in reversed(list(mapping))}
