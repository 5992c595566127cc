"""The plugins' hooks that this process is in, by name, in a file: it outlives a process that one of them crashes."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

__all__ = ["Journal", "keep_in", "noted"]

T = TypeVar("T")


@final
class Journal:
    """The file of one process: a JSON object with the names of the hooks that haven't returned, under "running".

    Args:
        descriptor: a descriptor of the file, open for writing; a process that is forked doesn't use it.
        facts: what else the object has.
    """

    def __init__(self, descriptor: int, facts: dict[str, Any]) -> None:
        self._descriptor = descriptor
        self._facts = facts
        self._pid = os.getpid()
        self._running: list[str] = []
        self._lock = threading.Lock()
        self._write()

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Have `name` in the file until the end of the block."""
        if self._pid != os.getpid():
            yield
            return
        with self._lock:
            self._running.append(name)
            self._write()
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(name)
                self._write()

    def _write(self) -> None:
        data = json.dumps({**self._facts, "running": self._running}).encode()
        with contextlib.suppress(OSError):  # a full disk: nobody learns which hook crashed this process
            os.ftruncate(self._descriptor, os.pwrite(self._descriptor, data, 0))


_journals: list[Journal] = []


def keep_in(journal: Journal | None) -> None:
    """Write down the hooks in this journal from now on; None: nowhere."""
    _journals[:] = [] if journal is None else [journal]


def noted(name: str, call: Callable[[], T]) -> Callable[[], T]:
    """Return a function that does what `call` does, and is in this process's journal, if it has one, until it returns.

    Args:
        name: the call's name, such as "connect of customar_v2".
        call: a hook of a plugin's, or its import.
    """

    def run() -> T:
        journal = next(iter(_journals), None)
        with contextlib.nullcontext() if journal is None else journal.running(name):
            return call()

    return run
