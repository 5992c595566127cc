"""Flags by which ranks say that they have unmapped their peers' buffers, before the owners free them.

CUDA doesn't define what happens when memory is freed while another process has it open by an IPC handle. So each rank
unmaps its peers' buffers, sets its flag in a page of host memory that the group shares, and frees its own buffer once
all flags are set.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from pathlib import Path

__all__ = ["UnmapFlags", "create", "remove"]

_FOLDER = Path("/dev/shm")  # noqa: S108 - the name has 64 random bits, and exists only until all ranks have opened it
_NAME = "comm-plugin-customar-v1-"
_POLL_S = 0.001


class UnmapFlags:
    """The group's page of flags, mapped by one rank.

    Args:
        token: the result of the first rank's `create`.
        rank: this rank.
        world_size: the number of ranks in the group.

    Raises:
        OSError: the page can't be opened.
        ConnectionError: it belongs to another user.
    """

    def __init__(self, token: str, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        descriptor = os.open(_path(token), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            owner = os.fstat(descriptor).st_uid
            if owner != os.geteuid():
                raise ConnectionError(f"the ranks' processes belong to different users: {owner} and {os.geteuid()}")
            self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)

    def set(self) -> None:
        """Say that this rank has no peer's buffer mapped, and won't map one."""
        self._page[self._rank] = 1

    def wait(self, timeout_s: float) -> tuple[int, ...]:
        """Wait until every rank has set its flag; returns the group ranks that haven't within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            unset = tuple(rank for rank in range(self._world_size) if not self._page[rank])
            if not unset or time.monotonic() >= deadline:
                return unset
            time.sleep(_POLL_S)


def create() -> str:
    """Create a page without any flag set; returns the token by which ranks open it.

    Raises:
        OSError: there is no space for it, or no permission.
    """
    token = secrets.token_hex(8)
    descriptor = os.open(_path(token), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Not just a length: without space, the first write to the page would be a bus error.
        os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
    except OSError:
        remove(token)
        raise
    finally:
        os.close(descriptor)
    return token


def remove(token: str) -> None:
    """Remove the page's name; ranks that have opened the page keep it."""
    _path(token).unlink(missing_ok=True)


def _path(token: str) -> Path:
    if not token.isalnum():
        raise ValueError(f"{token!r} isn't a token of `create`")
    return _FOLDER / f"{_NAME}{token}"
