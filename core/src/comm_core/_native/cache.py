"""The user's cache of compiled code and tuned tables: folders that no other user can write, one builder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from comm_core.env import PREFIX
from comm_core.errors import CommTimeoutError, PluginLoadError

__all__ = ["build_once", "mtime_ns", "private_folder", "read_private", "root", "write_private"]

_log = logging.getLogger("comm_core")

# The polling interval of a waiting process, in seconds: short against a build, long against a poll.
_POLL_S = 0.05


def root(configured: str | None) -> Path:
    """Return the cache's folder: as configured, else by the XDG base directory specification.

    Raises:
        PluginLoadError: this user's home folder is unknown.
    """
    if configured is not None:
        return Path(configured)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise PluginLoadError(
                f"there is no folder for the cache: {error}. Set {PREFIX}CACHE_DIR to a folder"
            ) from error
    return base / "comm_core"


def private_folder(top: Path, name: str) -> Path:
    """Return the folder `name` in the cache at `top`; create both if they are missing.

    Raises:
        PluginLoadError: another user could write to the folder or replace it.
        OSError: a folder can't be created.
    """
    return _ensure_private(_ensure_private(top) / name)


def read_private(top: Path, name: str, file: str, nbytes: int) -> bytes:
    """Return the contents of a file in the folder `name` of the cache at `top`.

    Raises:
        PluginLoadError: another user could write the file or replace it.
        OSError: it can't be read, or is larger than `nbytes`.
    """
    path = private_folder(top, name) / file
    _check_file(path)
    with path.open("rb") as opened:
        data = opened.read(nbytes + 1)
    if len(data) > nbytes:
        raise OSError(f"it has more than {nbytes} bytes")
    return data


def write_private(top: Path, name: str, file: str, data: bytes) -> Path:
    """Write a file in the folder `name` of the cache at `top`, in place of an earlier one; return its path.

    Raises:
        PluginLoadError: another user could write to the folder or replace it.
        OSError: it can't be written.
    """
    path = private_folder(top, name) / file
    descriptor, scratch = tempfile.mkstemp(prefix="new-", dir=path.parent)  # readable by this user alone
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def build_once(
    folder: Path, name: str, build: Callable[[Path], Path], timeout_s: float, *, rejected_ns: int | None = None
) -> Path:
    """Return the file `name` in a private folder; if it is missing, one process builds it and the others wait.

    The build runs in a folder beside it, and the complete file is moved into place: leftovers of a killed builder never
    count as the file, and its lock ends with its process. A file that differs from the digest that its builder recorded
    is built again: loading one that was cut short would end the process by a bus error.

    Args:
        folder: from `private_folder`.
        name: the file's name.
        build: builds the file in the given empty folder and returns its path.
        timeout_s: the longest wait for another process, in seconds.
        rejected_ns: the modification time, in nanoseconds, of a file that can't be loaded; it is built again.

    Raises:
        CommTimeoutError: another process hasn't finished in time.
        PluginLoadError: from `build`, here or in the process that this one waited for; or others can write the file.
        OSError: the folder can't be written or locked.
    """
    built, failure = folder / name, folder / "failure.txt"
    if not _is_intact(built, rejected_ns):
        before = mtime_ns(failure)
        with _locked(folder / "lock", timeout_s):
            if not _is_intact(built, rejected_ns):
                # Ranks that start together fail together: a failing build by each in turn would take minutes.
                if mtime_ns(failure) != before:
                    raise PluginLoadError(failure.read_text())
                if built.exists():
                    _log.warning("%s is damaged or can't be loaded: building it again", built)
                _build(folder, built, build, failure)
    _check_file(built)
    return built


def mtime_ns(path: Path) -> int | None:
    """Return a file's modification time in nanoseconds; None if there is no file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _is_intact(built: Path, rejected_ns: int | None) -> bool:
    """Return whether the file is complete, as its builder recorded; False if there is none, or it is rejected.

    Raises:
        PluginLoadError: others can write the file.
    """
    modified_ns = mtime_ns(built)
    if modified_ns is None:
        return False
    _check_file(built)
    try:
        recorded = _digest_path(built).read_text().strip()
    except FileNotFoundError:
        recorded = ""
    return modified_ns != rejected_ns and recorded == hashlib.sha256(built.read_bytes()).hexdigest()


def _digest_path(built: Path) -> Path:
    return built.with_name(f"{built.name}.sha256")


def _check_file(built: Path) -> None:
    status = built.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise PluginLoadError(f"{built} isn't loaded: it isn't a regular file. Remove {built.parent}")
    _check_owner(built, status, (os.geteuid(),))


def _build(folder: Path, built: Path, build: Callable[[Path], Path], failure: Path) -> None:
    """Build the file and move it into place. Needs the lock: other build folders are then dead processes' leftovers."""
    for left in folder.glob("build-*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        made = build(scratch)
        made.chmod(0o700)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # before the move: after a power cut there is the whole file or none
        digest = scratch / "digest"
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        # A process that sees the new file beside the old digest takes it for damaged, and then waits for the lock.
        made.replace(built)
        digest.replace(_digest_path(built))
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


def _ensure_private(folder: Path) -> Path:
    """Create or check one folder.

    Its parents may be links, which are resolved here once, and may belong to root; the folder itself may not.
    """
    folder = folder.parent.resolve() / folder.name
    for path in reversed([path for path in (folder, *folder.parents) if not os.path.lexists(path)]):
        with contextlib.suppress(FileExistsError):  # another process created it meanwhile
            path.mkdir(mode=0o700)
    for path in folder.parents:
        _check_owner(path, path.stat(), (0, os.geteuid()), shared=stat.S_ISVTX)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PluginLoadError(
            f"nothing is kept in {folder}: it isn't a folder, but a link or a file. Set "
            f"{PREFIX}CACHE_DIR to the folder itself"
        )
    _check_owner(folder, status, (os.geteuid(),))
    return folder


def _check_owner(path: Path, status: os.stat_result, owners: tuple[int, ...], *, shared: int = 0) -> None:
    """Raise `PluginLoadError` if another user can write or replace a path.

    Args:
        path: the path, for the error.
        status: the path's status.
        owners: the user ids that may own it.
        shared: a mode bit that makes a writable folder safe: in a sticky one users can replace only their own files.
    """
    remedy = f"or set {PREFIX}CACHE_DIR to a private folder of yours"
    if status.st_uid not in owners:
        raise PluginLoadError(
            f"nothing is loaded from the cache: {path} belongs to user id {status.st_uid}, not to "
            f"{os.geteuid()}. Remove it, {remedy}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & shared:
        raise PluginLoadError(
            f"nothing is loaded from the cache: others can write {path} (mode "
            f"{stat.S_IMODE(status.st_mode):04o}). Do chmod go-w {path}, {remedy}"
        )
