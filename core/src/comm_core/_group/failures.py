"""What failed in a rank's admission test: the first reason for each kind of message."""

from __future__ import annotations

from comm_core._control.deadline import describe, is_timeout
from comm_core._plan.routes import Cell
from comm_core._schema import shorten

__all__ = ["Failures"]

# The longest reason of one kind of message, as JSON in bytes: a vote has up to 51 of them.
_REASON_NBYTES = 300


class Failures(dict[Cell, str]):
    """For each kind of message that failed on this rank, the first reason.

    Attributes:
        after_timeout: the kinds that failed by a time-out or after one. The cause may lie on another rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.after_timeout: set[Cell] = set()
        self._timed_out = False

    @property
    def cause(self) -> str | None:
        """The first reason, unless a time-out came before it."""
        return next((reason for cell, reason in list(self.items()) if cell not in self.after_timeout), None)

    def add(self, cell: Cell, error: Exception) -> str:
        """Add a failure, unless its kind has one already; return its reason."""
        reason = shorten(describe(error), _REASON_NBYTES)
        self._timed_out = self._timed_out or is_timeout(error)
        if cell not in self:
            if self._timed_out:
                self.after_timeout.add(cell)
            self[cell] = reason
        return reason
