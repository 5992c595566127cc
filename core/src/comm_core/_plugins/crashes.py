"""Find what crashed earlier processes: each keeps, in the cache, a file with the hooks that it is in.

A process holds a lock on its file until it ends, so an unlocked file is of a process that has ended, even in another
container. One that ends normally removes its file.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import fcntl
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from comm_core._control.journal import Journal, use_journal
from comm_core._native import cache
from comm_core._schema import MalformedError, integer, load_json, record, text, tuple_of
from comm_core.errors import PluginLoadError

__all__ = ["Crash", "earlier_crashes", "end_journal", "stop_watching", "warn_of_crashes"]

_log = logging.getLogger("comm_core")

# Under the cache's folder.
_FOLDER = "running"
# Suffixes of a file's name: written by its process; left by a process that has ended, and logged.
_OWN, _LOGGED = ".json", ".logged"
# The largest file, in bytes: hundreds of hooks at once.
_NBYTES = 64 * 1024
# How long a crash is remembered, in seconds: a day.
_REMEMBERED_S = 24 * 3600


@dataclass(frozen=True)
class Crash:
    """A process that ended within a hook.

    Attributes:
        process: its number.
        program: the name of its program's file.
        started: when it loaded the plugins, as text.
        running: the hooks that it was in: "connect of customar_v2".
        path: the file that says so.
    """

    process: int
    program: str
    started: str
    running: tuple[str, ...]
    path: str = ""

    def __str__(self) -> str:
        return (
            f"process {self.process} ({self.program}, started {self.started}) ended within {', '.join(self.running)}: "
            "it crashed there or was killed"
        )

    @property
    def remedy(self) -> str:
        """How to go on without the plugin, and how to forget this."""
        names = ",".join(dict.fromkeys(name.rpartition(" of ")[2] for name in self.running))
        return f"If it crashed, update the plugin, or leave it out by COMM_CORE_DISABLE={names}"


_read = record(Crash, process=integer(), program=text, started=text, running=tuple_of(text))

# Whether this process takes part; and the files of this process and of those that it was forked from, by process id.
_watching = True
_files: dict[int, Path] = {}


def warn_of_crashes(cache_dir: str | None) -> None:
    """Begin this process's file, and log the crashes of earlier processes that no other one has logged. Never raises.

    Args:
        cache_dir: the setting.
    """
    if not _watching or os.getpid() in _files:
        return
    with contextlib.suppress(OSError, PluginLoadError):  # without a cache, nothing is remembered
        folder = cache.private_folder(cache.root(cache_dir), _FOLDER)
        for crash in _crashes_in(folder, _OWN):
            _log.warning("%s. %s", crash, crash.remedy)
        _begin_file(folder)


def earlier_crashes(cache_dir: str | None) -> list[Crash]:
    """Return the crashes of the last day that have been logged, the earliest first.

    Args:
        cache_dir: the setting.

    Raises:
        PluginLoadError, OSError: there is no cache.
    """
    folder = cache.private_folder(cache.root(cache_dir), _FOLDER)
    return sorted(_crashes_in(folder, _LOGGED), key=lambda crash: crash.started)


def end_journal() -> None:
    """Remove this process's file: it ends on purpose, whatever its threads are in."""
    use_journal(None)
    file = _files.pop(os.getpid(), None)
    if file is not None:
        file.unlink(missing_ok=True)


def stop_watching() -> None:
    """Keep no file in this process, and log no crash: a test kills it."""
    global _watching  # noqa: PLW0603 - one choice a process
    _watching = False


def _begin_file(folder: Path) -> None:
    path = folder / uuid.uuid4().hex
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)  # for as long as this process lives
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: each call comes here
        os.close(descriptor)
        path.unlink()
        raise
    started = dt.datetime.now().astimezone().isoformat(" ", "seconds")
    use_journal(Journal(descriptor, {"process": os.getpid(), "program": Path(sys.argv[0]).name, "started": started}))
    _files[os.getpid()] = path.rename(path.with_suffix(_OWN))  # it is locked now
    atexit.register(end_journal)


def _crashes_in(folder: Path, suffix: str) -> Iterator[Crash]:
    """Yield what the files with this suffix say, and rename them to logged ones; remove files that say nothing."""
    for path in list(folder.iterdir()):
        # Locked: of a process that lives. Missing: another process read it at the same time.
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_old = time.time() - os.fstat(file.fileno()).st_mtime > _REMEMBERED_S
            if not is_old and path.suffix != suffix:
                continue
            crash = None if is_old else _parse(file.read(_NBYTES))
            if crash is None:
                path.unlink()
            else:
                yield replace(crash, path=str(path.rename(path.with_suffix(_LOGGED))))


def _parse(data: bytes) -> Crash | None:
    with contextlib.suppress(MalformedError):
        crash: Crash = _read(load_json(data, _NBYTES), "the file")
        if crash.running:
            return crash
    return None
