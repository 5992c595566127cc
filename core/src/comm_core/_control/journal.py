"""The journal of a process: a file with the names of the plugins' hooks that it is in; it outlives a crash."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

__all__ = ["Journal", "journaled", "use_journal"]

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
        """Keep `name` in the file until the end of the block."""
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
        with contextlib.suppress(OSError):  # a full disk: then a crash goes unreported
            os.ftruncate(self._descriptor, os.pwrite(self._descriptor, data, 0))


_journal: Journal | None = None


def use_journal(journal: Journal | None) -> None:
    """Record this process's hooks in `journal` from now on; None: nowhere."""
    global _journal  # noqa: PLW0603 - one journal a process
    _journal = journal


def journaled(name: str, call: Callable[[], T]) -> Callable[[], T]:
    """Return `call` as a function that is in this process's journal, if there is one, until it returns.

    Args:
        name: the call's name, such as "connect of customar_v2".
        call: a plugin's hook, or its import.
    """

    def run() -> T:
        journal = _journal
        with contextlib.nullcontext() if journal is None else journal.running(name):
            return call()

    return run
