"""The frozen values that ranks exchange and decide on: what a backend serves, and what was decided.

Nothing here imports torch: a decision can be computed, stored and read where torch is broken or absent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

__all__ = [
    "DTYPES",
    "MODES",
    "OPS",
    "TERMINAL",
    "Available",
    "Candidate",
    "Decision",
    "Range",
    "Route",
    "Rule",
    "Unavailable",
    "rank_label",
]

OPS = ("all_reduce", "all_reduce_add_rms_norm")
"""The operations that a backend may serve."""
MODES = ("eager", "graph")
"""How a call runs: at once, or recorded into a CUDA graph inside `comm.capture()`."""
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
"""The dtypes that are routed, by torch's names, with their size in bytes; the fused operation takes only floats."""
TERMINAL = "torch_distributed"
"""The backend at the end of every route; it can't be disabled."""


def rank_label(rank: int, job_rank: int) -> str:
    """A group rank for people, with the job's rank where that differs: "1", "1 (3 in the job)"."""
    return str(rank) if rank == job_rank else f"{rank} ({job_rank} in the job)"


def _names(values: Iterable[Any] | None, prefix: str = "") -> tuple[str, ...] | None:
    if values is None:
        return None
    if isinstance(values, str):
        raise TypeError(f"a sequence of names is needed, not the string {values!r}")
    return tuple(dict.fromkeys(str(value).removeprefix(prefix) for value in values))


@dataclasses.dataclass(frozen=True)
class Range:
    """A set of messages that a backend serves: every condition holds at once.

    A range is at least as strict as its kernel. Several ranges of one backend add up.

    Attributes:
        op: one of `OPS`.
        modes: of `MODES`; None means both.
        dtypes: torch dtypes or their names ("bfloat16"); None means all of `DTYPES`.
        device_types: such as ("cuda",); None means any.
        min_nbytes: the smallest message, in bytes of the tensor to be reduced.
        max_nbytes: the largest message, in bytes; None means any.
        multiple_nbytes: the message's bytes are a multiple of it.
        max_tokens: the most rows of `[num_tokens, hidden_size]`, fused operation alone; None means any.
        hidden_multiple: `hidden_size` is a multiple of it, fused operation alone.
        prepared: served only once `pre_capture_init` has returned it.

    Raises:
        TypeError, ValueError: a field that no message could satisfy or that has the wrong type.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", _names(self.modes))
        object.__setattr__(self, "dtypes", _names(self.dtypes, "torch."))
        object.__setattr__(self, "device_types", _names(self.device_types))
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
            _check_int(field, getattr(self, field), lowest)
        if self.max_nbytes is not None:
            _check_int("max_nbytes", self.max_nbytes, self.min_nbytes)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)

    def serves(self, mode: str, device_type: str, dtype: str) -> bool:
        """Whether the range takes this mode, device type and dtype at some size."""
        return (
            (self.modes is None or mode in self.modes)
            and (self.device_types is None or device_type in self.device_types)
            and (self.dtypes is None or dtype in self.dtypes)
        )

    def intersect(self, other: Range) -> Range | None:
        """The messages that both ranges take, or None where there are none."""
        if self.op != other.op:
            return None
        sets: dict[str, tuple[str, ...] | None] = {}
        for field in ("modes", "dtypes", "device_types"):
            mine, theirs = getattr(self, field), getattr(other, field)
            both = theirs if mine is None else mine if theirs is None else tuple(v for v in mine if v in theirs)
            if both == ():
                return None
            sets[field] = both
        low = max(self.min_nbytes, other.min_nbytes)
        high = _smaller(self.max_nbytes, other.max_nbytes)
        multiple = math.lcm(self.multiple_nbytes, other.multiple_nbytes)
        if high is not None and high // multiple * multiple < low:
            return None
        return Range(
            op=self.op,
            min_nbytes=low,
            max_nbytes=high,
            multiple_nbytes=multiple,
            max_tokens=_smaller(self.max_tokens, other.max_tokens),
            hidden_multiple=math.lcm(self.hidden_multiple, other.hidden_multiple),
            prepared=self.prepared or other.prepared,
            **sets,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their default, as JSON."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name == "op" or getattr(self, field.name) != field.default
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Range:
        """The inverse of `to_json`."""
        return cls(**data)


def _check_int(field: str, value: object, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field}={value!r} isn't an integer")
    if value < lowest:
        raise ValueError(f"{field}={value} is below {lowest}")


def _smaller(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


@dataclasses.dataclass(frozen=True)
class Available:
    """A backend can serve the group.

    Attributes:
        priority: the higher is tried first. 0 the terminal fallback, 100 a vendor's library, 200 a generic
            custom kernel, 300 one made for this topology, 500 a third party's default, 900 a user's own.
        ranges: the messages it serves; empty means all that its hooks can be called with.
        checks_operands: whether `all_reduce_add_rms_norm` may be called with operands that core hasn't validated; see
            the hook. It then checks them itself, in native code faster than core can.
    """

    priority: int
    ranges: tuple[Range, ...] = ()
    checks_operands: bool = False

    def __post_init__(self) -> None:
        _check_int("priority", self.priority, 1)
        object.__setattr__(self, "ranges", tuple(self.ranges))
        for item in self.ranges:
            if not isinstance(item, Range):
                raise TypeError(f"ranges has {item!r}, which isn't a comm_core.Range")


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """A backend can't serve the group.

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
            (said no, or isn't there on every rank), "failed" (in `connect` or in its admission test), or "blocked"
            (by an argument or the environment).
        reason: of the verdict, as the rank in `rank` gave it.
        rank: the group rank that gave the reason; None if all did.
        priority: the lowest that a rank gave; None if it never said yes.
        version: its distribution's version; None if ranks differ or it isn't known.
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
    """

    backend: str
    min_nbytes: int = 0
    max_nbytes: int | None = None
    multiple_nbytes: int = 1
    max_tokens: int | None = None
    hidden_multiple: int = 1

    def takes(self, nbytes: int, num_tokens: int = 1, hidden_size: int = 0) -> bool:
        """Whether a message of `nbytes` bytes falls under this rule.

        Args:
            nbytes: bytes of the tensor to be reduced.
            num_tokens: rows of `[num_tokens, hidden_size]`, fused operation alone.
            hidden_size: elements a row, fused operation alone.
        """
        return (
            self.min_nbytes <= nbytes
            and (self.max_nbytes is None or nbytes <= self.max_nbytes)
            and nbytes % self.multiple_nbytes == 0
            and (self.max_tokens is None or num_tokens <= self.max_tokens)
            and hidden_size % self.hidden_multiple == 0
        )


@dataclasses.dataclass(frozen=True)
class Route:
    """The backends that serve one kind of message, by size: the first rule that takes it; the last takes every size.

    Attributes:
        op: one of `OPS`.
        mode: one of `MODES`.
        device_type: such as "cuda".
        dtype: one of `DTYPES`.
        rules: in order of priority; the last one is the terminal fallback's.
    """

    op: str
    mode: str
    device_type: str
    dtype: str
    rules: tuple[Rule, ...]

    def backend_for(self, nbytes: int, num_tokens: int = 1, hidden_size: int = 0) -> str:
        """The name of the backend that serves a message of `nbytes` bytes; see `Rule.takes`."""
        return next(rule.backend for rule in self.rules if rule.takes(nbytes, num_tokens, hidden_size))


@dataclasses.dataclass(frozen=True)
class Decision:
    """The plan of a group: its candidates and routes, equal on every rank.

    Attributes:
        candidates: every backend that some rank knows, in the order in which they were considered; the terminal
            fallback last.
        routes: one for each operation, mode, device type and dtype of the group.
    """

    candidates: tuple[Candidate, ...]
    routes: tuple[Route, ...]

    def candidate(self, name: str) -> Candidate | None:
        """Return the candidate of that name; None if no rank knows it."""
        return next((candidate for candidate in self.candidates if candidate.name == name), None)

    def route(self, op: str, mode: str, device_type: str, dtype: str) -> Route:
        """The route of one kind of message.

        Raises:
            LookupError: the group has none for these, say for CPU tensors where it has no CPU backend.
        """
        for route in self.routes:
            if (route.op, route.mode, route.device_type, route.dtype) == (op, mode, device_type, dtype):
                return route
        raise LookupError(f"no route for {op}, {mode}, {device_type}, {dtype}")

    def to_json(self) -> dict[str, Any]:
        """The decision as JSON."""
        return dataclasses.asdict(self)
