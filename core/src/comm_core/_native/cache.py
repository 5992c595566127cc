"""The user's cache of compiled code: folders that nobody else can write, and one builder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from comm_core.env import PREFIX
from comm_core.errors import CommTimeoutError, PluginLoadError

__all__ = ["build_once", "private_folder", "root"]

# How often a waiting process looks, in seconds: short against a build, long against a look.
_POLL_S = 0.05


def root(configured: str | None) -> Path:
    """Where the cache is: as configured, else where the XDG base directory specification puts it.

    Raises:
        PluginLoadError: nothing says where this user's files are.
    """
    if configured is not None:
        return Path(configured)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise PluginLoadError(f"no place for a cache: {error}. Set {PREFIX}CACHE_DIR to a folder") from error
    return base / "comm_core"


def private_folder(top: Path, name: str) -> Path:
    """The folder `name` in the cache at `top`, both made where they aren't there.

    Raises:
        PluginLoadError: another user could put a file there or exchange the folder.
        OSError: one can't be made.
    """
    return _private(_private(top) / name)


def build_once(folder: Path, name: str, build: Callable[[Path], Path], timeout_s: float) -> Path:
    """The file `name` in a private folder; where it isn't there, one process builds it and the others wait.

    Built in a folder beside it and moved into place when complete: what a killed builder leaves is never taken for it,
    and its lock ends with its process.

    Args:
        folder: from `private_folder`.
        name: the file's.
        build: makes the file in the empty folder that it is given; returns where.
        timeout_s: how long to wait for another process, in seconds.

    Raises:
        CommTimeoutError: another process isn't done in time.
        PluginLoadError: from `build`, here or in the process that this one waited for; or others can write the file.
        OSError: the folder can't be written or locked.
    """
    built, failure = folder / name, folder / "failure.txt"
    if not built.exists():
        before = _written(failure)
        with _locked(folder / "lock", timeout_s):
            if not built.exists():
                # Ranks that start together fail together: each trying in turn what can't be built would take minutes.
                if _written(failure) != before:
                    raise PluginLoadError(failure.read_text())
                _build(folder, built, build, failure)
    status = built.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise PluginLoadError(f"{built} isn't loaded: it isn't a regular file. Remove {folder}")
    _check_owner(built, status, (os.geteuid(),))
    return built


def _written(path: Path) -> int | None:
    """When a file was last written, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _build(folder: Path, built: Path, build: Callable[[Path], Path], failure: Path) -> None:
    """Called under the lock: any other such folder is a dead process's."""
    for left in folder.glob("build-*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        made = build(scratch)
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # before the name: after a power cut there is the whole file or none
        made.replace(built)
    except PluginLoadError as error:
        failure.write_text(str(error))
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 32, 0).decode() or "unknown"
                    raise CommTimeoutError(
                        f"process {holder} hasn't finished building in {path.parent} after {timeout_s:g} s. End it, "
                        f"or set {PREFIX}CONNECT_TIMEOUT_S higher"
                    ) from None
                time.sleep(_POLL_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _private(folder: Path) -> Path:
    """Make or check one folder.

    Its parents may be links, which are followed once and for all, and may be root's; the folder itself may not.
    """
    folder = folder.parent.resolve() / folder.name
    for path in reversed([path for path in (folder, *folder.parents) if not os.path.lexists(path)]):
        with contextlib.suppress(FileExistsError):  # another process made it meanwhile
            path.mkdir(mode=0o700)
    for path in folder.parents:
        _check_owner(path, path.stat(), (0, os.geteuid()), shared=stat.S_ISVTX)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PluginLoadError(
            f"compiled code isn't kept in {folder}: it isn't a folder of its own, but a link or a file. Set "
            f"{PREFIX}CACHE_DIR to where it leads"
        )
    _check_owner(folder, status, (os.geteuid(),))
    return folder


def _check_owner(path: Path, status: os.stat_result, owners: tuple[int, ...], *, shared: int = 0) -> None:
    """Refuse what another user can write or exchange.

    Args:
        path: for the error.
        status: of it.
        owners: the user ids that may own it.
        shared: a mode bit that makes a folder fit for many users: in a sticky one each keeps what is his.
    """
    remedy = f"or set {PREFIX}CACHE_DIR to a folder that is yours alone"
    if status.st_uid not in owners:
        raise PluginLoadError(
            f"compiled code isn't loaded from the cache: {path} belongs to user id {status.st_uid}, not to "
            f"{os.geteuid()}. Remove it, {remedy}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & shared:
        raise PluginLoadError(
            f"compiled code isn't loaded from the cache: others can write {path} (mode "
            f"{stat.S_IMODE(status.st_mode):04o}). Do chmod go-w {path}, {remedy}"
        )
