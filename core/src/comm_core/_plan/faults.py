"""Decide which backends a group drops in `comm.recover`, from the reports of all ranks. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from comm_core import _schema
from comm_core._control.deadline import describe, is_timeout, text_of
from comm_core.errors import CommError
from comm_core.types import TERMINAL

__all__ = ["Fault", "failed_backends", "fallback_failure", "read_fault"]

# The longest reason, as JSON in bytes.
_REASON_NBYTES = 1000
# The kinds of errors, the least likely consequences of another rank's failure first: any error but a `CommError`, a
# `CommError` (backends raise one if a peer has stopped), and one that a time-out caused.
_KINDS = ("own", "reported", "late")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One rank's report of the failure that stopped its handle.

    Attributes:
        backend: the name of the backend whose hook raised; "" if none did, such as for two threads in one handle.
        reason: the failure.
        kind: how likely another rank's failure caused it: "own", "reported" or "late".
        first: whether this rank's handle stopped before those of all others.
    """

    backend: str
    reason: str
    kind: str = _KINDS[0]
    first: bool = False

    @classmethod
    def of(cls, backend: str, hook: str, error: BaseException) -> Fault:
        """Return the report of an error that a backend's hook raised."""
        own, reported, late = _KINDS
        kind = late if is_timeout(error) else reported if isinstance(error, CommError) else own
        text = text_of(error) if isinstance(error, (CommError, TimeoutError)) else describe(error)
        return cls(backend, f"{hook}: {text}", kind)

    def to_json(self) -> list[Any]:
        """Return the report as JSON."""
        reason = _schema.shorten(_schema.printable(self.reason), _REASON_NBYTES)
        return [self.backend, reason, _KINDS.index(self.kind), self.first]


def read_fault(value: Any, where: str) -> Fault | None:
    """Read a rank's report; None if its handle is sound."""
    if value is None:
        return None
    backend, reason, kind, first = _schema.tuple_of(_schema.anything, 4, 4)(value, where)
    number = _schema.integer()(kind, f"{where}[2]")
    if number >= len(_KINDS):
        raise _schema.MalformedError(f"{where}[2] is {number}, no kind of error")
    return Fault(
        _schema.text(backend, f"{where}[0]"),
        _schema.printable(_schema.text(reason, f"{where}[1]")),
        _KINDS[number],
        _schema.boolean(first, f"{where}[3]"),
    )


def failed_backends(faults: Sequence[Fault | None]) -> dict[str, tuple[str, int]]:
    """Return the backends to drop, each with the reason and the group rank that gave it.

    Once a handle stops, its peers' calls fail, too, maybe in other backends. So a backend is dropped if it raised an
    error of its own on some rank. If none did, because all ranks waited for one or learned of a failure, it is the
    one in which the first handle stopped.

    Args:
        faults: the reports by group rank; None for a handle that is sound.
    """
    reports = [(fault, rank) for rank, fault in enumerate(faults) if fault is not None and fault.backend]
    own = [(fault, rank) for fault, rank in reports if fault.kind == _KINDS[0]]
    if not own and reports:
        own = [min(reports, key=lambda report: (not report[0].first, _KINDS.index(report[0].kind), report[1]))]
    failed: dict[str, tuple[str, int]] = {}
    for fault, rank in own:
        failed.setdefault(fault.backend, (fault.reason, rank))
    return failed


def fallback_failure(faults: Sequence[Fault | None]) -> tuple[str, int] | None:
    """Return the reason for which torch.distributed failed, and the first rank where it did; None if it didn't."""
    reports = ((fault, rank) for rank, fault in enumerate(faults) if fault is not None)
    return next(((fault.reason, rank) for fault, rank in reports if fault.backend == TERMINAL), None)
