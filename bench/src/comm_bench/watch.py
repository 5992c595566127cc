"""A deadline for what can't be interrupted: a kernel that waits for ever, and the call that waits for it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["Watch"]

# Between two looks, in seconds: seldom enough to disturb no timing.
_INTERVAL_S = 1.0
_LINGER_S = 2.0


class Watch:
    """Ends the process, naming the step, when one takes longer than it was given; torchrun then ends the others."""

    def __init__(self) -> None:
        self._step: tuple[str, float, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="comm-core bench: watch", daemon=True).start()

    @contextlib.contextmanager
    def step(self, what: str, timeout_s: float) -> Iterator[None]:
        """A step that is given so many seconds."""
        self._step = (what, timeout_s, time.monotonic() + timeout_s)
        try:
            yield
        finally:
            self._step = None

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            step = self._step
            if step is not None and time.monotonic() > step[2]:
                sys.stderr.write(f"comm-core bench: {step[0]}: no end after {step[1]:g} s\n")
                faulthandler.dump_traceback(all_threads=True)
                # The other ranks, which wait for the same, tell where they are before they are ended.
                time.sleep(_LINGER_S)
                os._exit(1)
