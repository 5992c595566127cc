"""What failed in a rank's admission test: the first reason for each kind of message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comm_core._control.deadline import describe, is_timeout
from comm_core._plan.routes import Cell
from comm_core._schema import shorten

if TYPE_CHECKING:
    import torch

__all__ = ["Failures", "describe_wrong"]

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


def describe_wrong(what: str, wrong: torch.Tensor, result: torch.Tensor, expected: torch.Tensor) -> str:
    """Describe wrong elements: how many there are, and the first with both values.

    Args:
        what: their name, in the plural.
        wrong: where they are, at least one.
        result: what came.
        expected: what was due.
    """
    first = int(wrong.flatten().nonzero()[0])
    came, due = result.flatten()[first].item(), expected.flatten()[first].item()
    return f"{int(wrong.sum())} {what}, the first at element {first}: {came} instead of {due}"
