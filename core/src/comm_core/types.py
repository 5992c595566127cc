"""Frozen values for the negotiation: the messages that a backend serves, and the decision of a group.

Nothing here imports torch: a decision can be computed, stored and read even if torch is broken or absent.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from comm_core import _schema
from comm_core.stats import RouteStats, WaitStats

__all__ = [
    "DTYPES",
    "MAX_RANGES",
    "MODES",
    "OPS",
    "QUANTS",
    "RANK_ORDER_FP32",
    "TERMINAL",
    "WIRES",
    "Available",
    "Candidate",
    "Decision",
    "Range",
    "Route",
    "RouteStats",
    "Rule",
    "Unavailable",
    "WaitStats",
    "rank_label",
]

OPS = ("all_reduce", "all_reduce_add_rms_norm", "all_reduce_add_rms_norm_quant")
"""The operations that a backend may serve; the last two are the fused ones."""
QUANTS = ("fp8_static", "fp8_per_token", "fp8_per_group")
"""The forms of `all_reduce_add_rms_norm_quant`: one scale given; a scale for each row; for each 128 of its elements."""
MODES = ("eager", "graph")
"""The modes of a call: run at once, or recorded into a CUDA graph inside `comm.capture()`."""
DTYPES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}
"""The supported dtypes, by torch's names, with their sizes in bytes; fused operations take only floats."""
TERMINAL = "torch_distributed"
"""The backend at the end of every route; it can't be disabled."""
RANK_ORDER_FP32 = "rank_order_fp32"
"""The numerics that deterministic groups require; see `Available.numerics`."""
WIRES = ("fp8",)
"""The quantised wires of plain sums; see `comm_core.get_backend`."""

MAX_RANGES = 64
"""The most ranges that one answer of a backend may have: the answers of all backends share one message."""


def rank_label(rank: int, job_rank: int) -> str:
    """Format a group rank for a message, with the job's rank if that differs: "1", "1 (3 in the job)"."""
    return str(rank) if rank == job_rank else f"{rank} ({job_rank} in the job)"


@dataclasses.dataclass(frozen=True)
class Range:
    """A set of messages that a backend serves: those that meet every condition.

    A range is at least as strict as its kernel. Several ranges of one backend add up.

    Attributes:
        op: one of `OPS`.
        modes: of `MODES`; None means both.
        dtypes: torch dtypes or their names ("bfloat16"); None means all of `DTYPES`.
        device_types: such as ("cuda",); None means any.
        min_nbytes: the smallest message, in bytes of the tensor to be reduced.
        max_nbytes: the largest message, in bytes; None means any.
        multiple_nbytes: the message's size in bytes is a multiple of this number.
        max_tokens: the largest `num_tokens` of `[num_tokens, hidden_size]`, fused operations only; None means any.
        hidden_multiple: `hidden_size` is a multiple of this number, fused operations only.
        prepared: served only once `pre_capture_init` has returned it.
        wire: one of `WIRES`, plain sums only: such messages travel quantised, with the error bound of that wire; see
            `comm_core.get_backend`. Served in groups that ask for the wire, before all ranges without one. "": exact.

    Raises:
        TypeError, ValueError: a field has the wrong type, or no message could satisfy it.
    """

    op: str
    modes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    device_types: tuple[str, ...] | None = None
    min_nbytes: int = 0
    max_nbytes: int | None = None
    multiple_nbytes: int = 1
    max_tokens: int | None = None
    hidden_multiple: int = 1
    prepared: bool = False
    wire: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", _schema.unique_names(self.modes))
        object.__setattr__(self, "dtypes", _schema.unique_names(self.dtypes, "torch."))
        object.__setattr__(self, "device_types", _schema.unique_names(self.device_types))
        if self.op not in OPS:
            raise ValueError(f"op={self.op!r} isn't one of {', '.join(OPS)}")
        for field, known in (("modes", MODES), ("dtypes", tuple(DTYPES))):
            unknown = [name for name in getattr(self, field) or () if name not in known]
            if unknown:
                raise ValueError(f"{field} has {', '.join(unknown)}; known are {', '.join(known)}")
        for field in ("modes", "dtypes", "device_types"):
            if getattr(self, field) == ():
                raise ValueError(f"{field} is empty, which no message satisfies; None means any")
        for field, lowest in (("min_nbytes", 0), ("multiple_nbytes", 1), ("hidden_multiple", 1)):
            _schema.check_int(field, getattr(self, field), lowest)
        if self.max_nbytes is not None:
            _schema.check_int("max_nbytes", self.max_nbytes, self.min_nbytes)
        if self.max_tokens is not None:
            _schema.check_int("max_tokens", self.max_tokens, 1)
        _schema.check_bool("prepared", self.prepared)
        wires = ("", *WIRES) if self.op == "all_reduce" else ("",)
        if self.wire not in wires:
            raise ValueError(f"wire={self.wire!r}: {self.op} takes {' or '.join(map(repr, wires))}")

    def serves(self, mode: str, device_type: str, dtype: str) -> bool:
        """Return whether the range takes this mode, device type and dtype at some size."""
        return (
            (self.modes is None or mode in self.modes)
            and (self.device_types is None or device_type in self.device_types)
            and (self.dtypes is None or dtype in self.dtypes)
        )

    def intersect(self, other: Range) -> Range | None:
        """Return the range of messages that both ranges take, or None if there are none."""
        if (self.op, self.wire) != (other.op, other.wire):
            return None
        sets: dict[str, tuple[str, ...] | None] = {}
        for field in ("modes", "dtypes", "device_types"):
            mine, theirs = getattr(self, field), getattr(other, field)
            both = theirs if mine is None else mine if theirs is None else tuple(v for v in mine if v in theirs)
            if both == ():
                return None
            sets[field] = both
        low = max(self.min_nbytes, other.min_nbytes)
        high = _smaller_bound(self.max_nbytes, other.max_nbytes)
        multiple = math.lcm(self.multiple_nbytes, other.multiple_nbytes)
        hidden_multiple = math.lcm(self.hidden_multiple, other.hidden_multiple)
        if max(multiple, hidden_multiple) > _schema.MAX_INT:
            return None
        if high is not None and high // multiple * multiple < low:
            return None
        return Range(
            op=self.op,
            min_nbytes=low,
            max_nbytes=high,
            multiple_nbytes=multiple,
            max_tokens=_smaller_bound(self.max_tokens, other.max_tokens),
            hidden_multiple=hidden_multiple,
            prepared=self.prepared or other.prepared,
            wire=self.wire,
            **sets,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name == "op" or getattr(self, field.name) != field.default
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Range:
        """Build a range from the output of `to_json`.

        Raises:
            ValueError: a field is unknown, missing or has the wrong type; the text names it. An unknown field may be a
                condition, so it isn't ignored.
        """
        item: Range = _RANGE(data, "range")
        return item


def _smaller_bound(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


_NAMES = _schema.optional(_schema.tuple_of(_schema.text, 1, _schema.MAX_NAMES))
_SIZE = _schema.integer()
_RANGE = _schema.record(
    Range,
    strict=True,
    op=_schema.text,
    modes=_NAMES,
    dtypes=_NAMES,
    device_types=_NAMES,
    min_nbytes=_SIZE,
    max_nbytes=_schema.optional(_SIZE),
    multiple_nbytes=_SIZE,
    max_tokens=_schema.optional(_SIZE),
    hidden_multiple=_SIZE,
    prepared=_schema.boolean,
    wire=_schema.text,
)


@dataclasses.dataclass(frozen=True)
class Available:
    """The answer of a backend that can serve the group.

    Attributes:
        priority: higher ones are tried first. Bands: 0 the terminal fallback, 100 a vendor's library, 200 a generic
            custom kernel, 300 a kernel for this topology, 500 a third party's default, 900 a user's own.
        ranges: the messages it serves, at most 64 ranges; empty means every message that its hooks can take.
        checks_operands: whether `all_reduce_add_rms_norm` may be called with operands that core hasn't validated; see
            the hook. The backend then checks them itself, in native code that is faster than core's checks.
        numerics: the name of the arithmetic that determines the bits of every sum; "" if they are unspecified.
            "rank_order_fp32": an element is the sum of rank 0's term, rank 1's and so on, in float32, rounded once to
            the tensor's dtype; float64 and integers are summed in their own type. The fused operation's sum adds the
            residual last, and a row's bits depend on its operands, dtype and hidden size, not on the other rows. So
            neither the size of a message nor the mode nor the algorithm changes a bit. Deterministic groups take only
            such backends; see `comm_core.get_backend`. Only the bits of a NaN are open.
    """

    priority: int
    ranges: tuple[Range, ...] = ()
    checks_operands: bool = False
    numerics: str = ""

    def __post_init__(self) -> None:
        _schema.check_int("priority", self.priority, 1)
        object.__setattr__(self, "ranges", tuple(self.ranges))
        for item in self.ranges:
            if not isinstance(item, Range):
                raise TypeError(f"ranges has {item!r}, which isn't a comm_core.Range")
        _schema.check_bool("checks_operands", self.checks_operands)
        if not isinstance(self.numerics, str):
            raise TypeError(f"numerics={self.numerics!r} isn't a string")
        _schema.unique_names((self.numerics,))


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """The answer of a backend that can't serve the group.

    Attributes:
        reason: one sentence without a full stop; `explain` prints it.
    """

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise TypeError(f"reason={self.reason!r}: say why, in one sentence")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The outcome of one backend in a group's negotiation.

    Attributes:
        name: the backend's name.
        verdict: "serves" (owns a route), "standby" (could serve, but others come first everywhere), "unavailable"
            (its `is_available` said so, or some rank lacks it), "failed" (in `connect` or in its admission test), or
            "blocked" (by an argument or the environment).
        reason: the reason for the verdict, as the rank in `rank` gave it.
        rank: the group rank that gave the reason; None if all did.
        priority: the lowest of the ranks' priorities; None if no rank gave one.
        version: its distribution's version; None if the ranks' versions differ or it is unknown.
    """

    name: str
    verdict: str
    reason: str
    rank: int | None = None
    priority: int | None = None
    version: str | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of a route: messages within these bounds go to `backend`.

    Units and meaning are those of `Range`.

    Attributes:
        tuned: the rule of `Decision.tuning` that gave it its place; "": none.
        piece_nbytes: larger messages go to the backend in pieces of at most this size, in bytes. The pieces of a fused
            message are whole rows; the rule takes no message with a longer row. None: every message goes as a whole.
            Only deterministic groups have pieces.
        wire: one of `WIRES` if the messages travel quantised, else "".
    """

    backend: str
    min_nbytes: int = 0
    max_nbytes: int | None = None
    multiple_nbytes: int = 1
    max_tokens: int | None = None
    hidden_multiple: int = 1
    tuned: str = ""
    piece_nbytes: int | None = None
    wire: str = ""

    def takes(self, nbytes: int, num_tokens: int = 1, hidden_size: int = 0) -> bool:
        """Return whether this rule applies to a message of `nbytes` bytes.

        Args:
            nbytes: bytes of the tensor to be reduced.
            num_tokens: rows of `[num_tokens, hidden_size]`, fused operations only.
            hidden_size: elements per row, fused operations only.
        """
        return (
            self.min_nbytes <= nbytes
            and (self.max_nbytes is None or nbytes <= self.max_nbytes)
            and nbytes % self.multiple_nbytes == 0
            and (self.max_tokens is None or num_tokens <= self.max_tokens)
            and hidden_size % self.hidden_multiple == 0
            and (self.piece_nbytes is None or not hidden_size or nbytes <= self.piece_nbytes * num_tokens)
        )


@dataclasses.dataclass(frozen=True)
class Route:
    """The backends that serve one operation, mode, device type and dtype, by message size.

    The first rule that takes a message decides; the last one takes every size.

    Attributes:
        op: one of `OPS`.
        mode: one of `MODES`.
        device_type: such as "cuda".
        dtype: one of `DTYPES`.
        rules: in order of priority or tuned score; the last one is the terminal fallback's.
    """

    op: str
    mode: str
    device_type: str
    dtype: str
    rules: tuple[Rule, ...]

    def backend_for(self, nbytes: int, num_tokens: int = 1, hidden_size: int = 0) -> str:
        """Return the name of the backend that serves a message of `nbytes` bytes; see `Rule.takes`."""
        return next(rule.backend for rule in self.rules if rule.takes(nbytes, num_tokens, hidden_size))


@dataclasses.dataclass(frozen=True)
class Decision:
    """The plan of a group: its candidates and routes, equal on every rank.

    Attributes:
        candidates: every backend that some rank knows, in the order of their consideration; the terminal fallback last.
        routes: one for each operation, mode, device type and dtype of the group.
        tuning: the rules that overrode priorities, as texts; see `comm_core.tuning`.
        tuned_by: where they come from; without rules, a sentence on the tuned table, if there is one.
        deterministic: whether the group is deterministic; see `comm_core.get_backend`.
        variants: by backend, the choices of the tuned table among its variants, as texts.
        wire: the quantised wire that the group asks for, one of `WIRES`; "": none.
    """

    candidates: tuple[Candidate, ...]
    routes: tuple[Route, ...]
    tuning: tuple[str, ...] = ()
    tuned_by: str = ""
    deterministic: bool = False
    variants: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    wire: str = ""

    def candidate(self, name: str) -> Candidate | None:
        """Return the candidate of that name; None if no rank knows it."""
        return next((candidate for candidate in self.candidates if candidate.name == name), None)

    def route(self, op: str, mode: str, device_type: str, dtype: str) -> Route:
        """Return the route of one operation, mode, device type and dtype.

        Raises:
            LookupError: the group has no such route, for example for CPU tensors if it has no CPU backend.
        """
        for route in self.routes:
            if (route.op, route.mode, route.device_type, route.dtype) == (op, mode, device_type, dtype):
                return route
        raise LookupError(f"no route for {op}, {mode}, {device_type}, {dtype}")

    def to_json(self) -> dict[str, Any]:
        """Return the decision as JSON."""
        return dataclasses.asdict(self)
