"""Rules that override the backends' priorities for some messages, and choices among a backend's variants. Pure.

A rule, as in the variable `COMM_CORE_TUNE`, names a backend, conditions on the message in any order, and last a score:

```
customar_v1:all_reduce:0-4M:graph:400, nccl:4M-inf:inf
```

- operation: `all_reduce`, `fused` for `all_reduce_add_rms_norm`, `fused_quant` for its form with FP8 out; mode:
  `eager` or `graph`; device type: `cuda` or `cpu`; size: the smallest and the largest message in bytes, both included,
  such as `64K-4M` or `4M-inf`. A condition that is left out holds for every message.
- score: takes the place of the backend's priority. The backend with the highest one serves a message; `0` excludes the
  backend, `inf` puts it before all others. Between equal scores the usual order decides.

Of several rules of one backend that match a message, the last one counts. A rule can't extend a backend's ranges: a
message outside them goes to the next backend, at the end to `torch_distributed`. That one can have a score, too, but
can't be excluded.

A `VariantChoice` says by which of its algorithms and launch shapes a backend serves some messages; `comm-core tune`
measures them, and a tuned table has them beside its rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from comm_core import _schema
from comm_core.types import MODES, OPS, TERMINAL

__all__ = [
    "MAX_RULES",
    "NO_RULES",
    "NO_TUNING",
    "RuleError",
    "Tuning",
    "TuningRule",
    "VariantChoice",
    "overlay",
    "parse_rules",
    "parse_size",
    "short_size",
]

MAX_RULES = 64
"""The most rules in one text."""
NO_RULES = "none"
"""The text that stands for no rules at all."""
# The longest text of a variant, in characters.
_VARIANT_CHARS = 200
_Row = TypeVar("_Row")

# The operations by their short names, as in `comm-core explain --op`.
_SHORT = dict(zip(("all_reduce", "fused", "fused_quant"), OPS, strict=True))
_OPS = {**_SHORT, **{op: op for op in OPS}}
_DEVICE_TYPES = ("cuda", "cpu")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SIZE = re.compile(r"(\d{1,19})([KMG]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# The most characters that an error shows before and after the place that it points at.
_SHOWN_CHARS = 40


class RuleError(ValueError):
    """A text isn't a list of rules.

    Attributes:
        excerpt: the text around the fault, and a second line with a mark below the fault.
    """

    def __init__(self, reason: str, text: str, at: int, length: int) -> None:
        super().__init__(f"at character {at + 1}, {reason}")
        first = max(at - _SHOWN_CHARS, 0)
        length = max(min(length, _SHOWN_CHARS), 1)
        last = min(at + length + _SHOWN_CHARS, len(text))
        before = ("..." if first else "") + text[first:at]
        after = text[at:last] + ("..." if last < len(text) else "")
        self.excerpt = (f"  {_visible(before + after)}", f"  {' ' * len(before)}{'^' * length}")


@dataclasses.dataclass(frozen=True)
class TuningRule:
    """A rule; `str` of it is its text.

    Attributes:
        backend: the backend's name.
        score: takes the place of its priority; 0 excludes it, `math.inf` puts it first.
        op: one of `comm_core.types.OPS`; None: all.
        mode: one of `comm_core.types.MODES`; None: both.
        device_type: "cuda" or "cpu"; None: both.
        min_nbytes: the smallest message, in bytes.
        max_nbytes: the largest message, in bytes; None: any.
    """

    backend: str
    score: float
    op: str | None = None
    mode: str | None = None
    device_type: str | None = None
    min_nbytes: int = 0
    max_nbytes: int | None = None

    def matches(self, backend: str, op: str, mode: str, device_type: str) -> bool:
        """Return whether the rule concerns messages of this kind by this backend, at some size."""
        return (
            self.backend == backend
            and self.op in {None, op}
            and self.mode in {None, mode}
            and self.device_type in {None, device_type}
        )

    def __str__(self) -> str:
        op = next((short for short, op in _SHORT.items() if op == self.op), None)
        size = None
        if self.min_nbytes or self.max_nbytes is not None:
            size = f"{short_size(self.min_nbytes)}-{short_size(self.max_nbytes)}"
        score = "inf" if self.score == math.inf else f"{self.score:.0f}"
        return ":".join(filter(None, (self.backend, op, size, self.mode, self.device_type, score)))


@dataclasses.dataclass(frozen=True)
class VariantChoice:
    """The variant by which a backend serves some messages: one of the texts of its hook `variants`.

    Attributes:
        op: one of `comm_core.types.OPS`.
        variant: the variant's text.
        min_nbytes: the smallest message, in bytes of the tensor that is reduced.
        max_nbytes: the largest message, in bytes; None: any.

    Raises:
        TypeError, ValueError: a field has the wrong type or an impossible value.
    """

    op: str
    variant: str
    min_nbytes: int = 0
    max_nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op={self.op!r} isn't one of {', '.join(OPS)}")
        if not isinstance(self.variant, str):
            raise TypeError(f"variant={self.variant!r} isn't a text")
        if not 0 < len(self.variant) <= _VARIANT_CHARS:
            raise ValueError(f"a variant's text has 1 to {_VARIANT_CHARS} characters, not {len(self.variant)}")
        _schema.check_int("min_nbytes", self.min_nbytes, 0)
        if self.max_nbytes is not None:
            _schema.check_int("max_nbytes", self.max_nbytes, self.min_nbytes)

    def takes(self, nbytes: int) -> bool:
        """Return whether messages of `nbytes` bytes are within the bounds."""
        return self.min_nbytes <= nbytes and (self.max_nbytes is None or nbytes <= self.max_nbytes)

    def __str__(self) -> str:
        return f"{self.op} {short_size(self.min_nbytes)}-{short_size(self.max_nbytes)}: {self.variant}"


def overlay(rows: Sequence[_Row], choices: Sequence[VariantChoice], parse: Callable[[str], _Row]) -> tuple[_Row, ...]:
    """Return a backend's table by size with choices in place of its rows, for a hook `use_variants`.

    Args:
        rows: the backend's table: dataclasses with a field `up_to_nbytes`, the largest message, ascending.
        choices: of one operation.
        parse: returns a row for a variant's text, with any `up_to_nbytes`.

    Returns:
        Rows up to the size of the table's last one.

    Raises:
        Exception: `parse` raised it.
    """
    table: Sequence[Any] = rows
    largest = table[-1].up_to_nbytes
    parsed: list[tuple[VariantChoice, Any]] = [(choice, parse(choice.variant)) for choice in choices]
    ends = {row.up_to_nbytes for row in table} | {choice.min_nbytes - 1 for choice in choices}
    ends |= {choice.max_nbytes for choice in choices if choice.max_nbytes is not None}
    found = []
    for end in sorted(end for end in ends if 0 < end <= largest):
        own = next(row for row in table if end <= row.up_to_nbytes)
        row = next((row for choice, row in parsed if choice.takes(end)), own)
        found.append(dataclasses.replace(row, up_to_nbytes=end))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The tuning of a group's plan, equal on every rank.

    Attributes:
        rules: the rules.
        source: where they come from; without rules, a sentence that says why none are used, or "".
        variants: by backend, the choices among its variants.
    """

    rules: tuple[TuningRule, ...] = ()
    source: str = ""
    variants: Mapping[str, tuple[VariantChoice, ...]] = dataclasses.field(default_factory=dict)


NO_TUNING = Tuning()
"""No rules."""


def parse_size(text: str) -> int:
    """Return the bytes that a text stands for: "8", "64K", "1M", "2GiB"; K, M and G are powers of 1024.

    Raises:
        ValueError: it is no size, or above 2**63 - 1.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"expected bytes, such as 8, 64K or 1M; got {_schema.shorten(repr(text), 60)}")
    nbytes = int(found[1]) * _UNITS[found[2].upper()]
    if nbytes > _schema.MAX_INT:
        raise ValueError("expected bytes below 2**63")
    return nbytes


def short_size(nbytes: int | None) -> str:
    """Return the shortest text of a size that `parse_size` reads; "inf" for None."""
    if nbytes is None:
        return "inf"
    units = {factor: unit for unit, factor in _UNITS.items() if nbytes and nbytes % factor == 0}
    factor = max(units, default=1)
    return f"{nbytes // factor}{units.get(factor, '')}"


def parse_rules(text: str) -> tuple[TuningRule, ...]:
    """Read rules that commas separate; `none` stands for no rules.

    Raises:
        RuleError: a rule can't be read; the error points at the place.
    """
    if text.strip() == NO_RULES:
        return ()
    rules = [_parse_rule(text, parts) for parts in _split(text)]
    if not rules:
        raise RuleError("there is no rule", text, 0, 1)
    if len(rules) > MAX_RULES:
        raise RuleError(f"there are {len(rules)} rules; the limit is {MAX_RULES}", text, 0, 1)
    return tuple(rules)


def _split(text: str) -> Iterator[list[tuple[str, int]]]:
    """Yield the parts of each rule, without the spaces around them, with their places in the text."""
    start = 0
    for rule in text.split(","):
        if rule.strip():
            parts, at = [], start
            for part in rule.split(":"):
                parts.append((part.strip(), at + len(part) - len(part.lstrip())))
                at += len(part) + 1
            yield parts
        start += len(rule) + 1


def _parse_rule(text: str, parts: Sequence[tuple[str, int]]) -> TuningRule:
    (backend, at), *conditions = parts
    if not _NAME.fullmatch(backend):
        raise RuleError(f"expected a backend's name, got {_shown(backend)}", text, at, len(backend))
    if not conditions:
        raise RuleError(
            "the rule ends without a score; add 0, a number or inf, as in shm:80", text, at + len(backend), 1
        )
    *conditions, (last, last_at) = conditions
    fields: dict[str, str | int | None] = {}
    for part, place in conditions:
        for name, value in _condition(text, part, place).items():
            if name in fields:
                raise RuleError(f"{_shown(part)} is the rule's second {_KINDS[name]}", text, place, len(part))
            fields[name] = value
    return TuningRule(backend, _score(text, backend, last, last_at), **fields)  # type: ignore[arg-type]


_KINDS = {"op": "operation", "mode": "mode", "device_type": "device type", "min_nbytes": "range of sizes"}


def _condition(text: str, part: str, at: int) -> dict[str, str | int | None]:
    """Return the fields of a rule that one part of it sets."""
    if part in _OPS:
        return {"op": _OPS[part]}
    if part in MODES:
        return {"mode": part}
    if part in _DEVICE_TYPES:
        return {"device_type": part}
    low, dash, high = part.partition("-")
    if dash:
        try:
            bounds = parse_size(low.strip()), None if high.strip() == "inf" else parse_size(high.strip())
        except ValueError as error:
            raise RuleError(f"{_shown(part)} isn't a range of sizes: {error}", text, at, len(part)) from None
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise RuleError(f"the range {_shown(part)} ends below its start", text, at, len(part))
        return {"min_nbytes": bounds[0], "max_nbytes": bounds[1]}
    if part == "inf" or part.isdecimal():
        raise RuleError(f"{_shown(part)} is a score, and a rule ends with its score", text, at, len(part))
    near = difflib.get_close_matches(part.lower(), [*_OPS, *MODES, *_DEVICE_TYPES], n=1)
    hint = f"; did you mean {near[0]}?" if near else ", such as all_reduce, graph, cuda or 0-4M"
    raise RuleError(f"{_shown(part)} is no operation, mode, device type or range of sizes{hint}", text, at, len(part))


def _score(text: str, backend: str, part: str, at: int) -> float:
    if part == "inf":
        return math.inf
    if not (part.isascii() and part.isdecimal()):
        raise RuleError(f"the rule must end with a score: 0, a number or inf; got {_shown(part)}", text, at, len(part))
    if len(part) > 9:
        raise RuleError("a score has at most nine digits; inf puts a backend first", text, at, len(part))
    if int(part) == 0 and backend == TERMINAL:
        raise RuleError(f"{TERMINAL} can't be excluded: every plan ends with it", text, at, len(part))
    return int(part)


def _shown(part: str) -> str:
    return _schema.shorten(repr(_visible(part)), 60)


def _visible(text: str) -> str:
    """Return the text with one printable character for each of its characters."""
    return "".join(char if char.isprintable() and char.isascii() else "?" for char in text)
