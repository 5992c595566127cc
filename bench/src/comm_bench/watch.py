"""A deadline for steps that can't be interrupted: a kernel that waits forever, and the call that waits for it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["Watchdog"]

# Seconds between two polls, long enough not to disturb a timing.
_INTERVAL_S = 1.0
_LINGER_S = 2.0


class Watchdog:
    """Ends the process if a step takes longer than its deadline, and names the step; torchrun then ends the others."""

    def __init__(self) -> None:
        self._step: tuple[str, float, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._poll, name="comm-core bench: watchdog", daemon=True).start()

    @contextlib.contextmanager
    def step(self, what: str, timeout_s: float) -> Iterator[None]:
        """Limit the body of a `with` statement to this many seconds."""
        self._step = (what, timeout_s, time.monotonic() + timeout_s)
        try:
            yield
        finally:
            self._step = None

    def close(self) -> None:
        """Stop the watchdog's thread."""
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            step = self._step
            if step is not None and time.monotonic() > step[2]:
                sys.stderr.write(f"comm-core bench: {step[0]} took longer than {step[1]:g} s; the process ends\n")
                faulthandler.dump_traceback(all_threads=True)
                # Give the other ranks, which usually wait for the same step, time to print their stacks too.
                time.sleep(_LINGER_S)
                os._exit(1)
