"""The progress of a run, on stderr if that is a terminal."""

from __future__ import annotations

import sys
import time

from comm_bench.cases import BenchCase
from comm_bench.document import Listener
from comm_bench.results import title

__all__ = ["Progress"]


class Progress(Listener):
    """Shows the case that is measured, and about how long the others take."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_case_start(self, number: int, count: int, case: BenchCase) -> None:
        """Show the case, and the time that is left."""
        if number == 1:
            self._started = time.monotonic()
        taken_s, done = time.monotonic() - self._started, number - 1
        left = f", about {taken_s / done * (count - done):.0f} s left" if done else ""
        self.show(f"{number}/{count}  {title(case.op, case.mode, case.place)}, {case.dtype}, {case.nbytes} B{left}")

    def on_drop(self, name: str, where: str, reason: str) -> None:
        """Print which contender is left out, and why."""
        self.show("")
        sys.stderr.write(f"{name} is left out of {where}: {reason}\n")

    def show(self, text: str) -> None:
        """Replace the line of progress; "" removes it."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()
