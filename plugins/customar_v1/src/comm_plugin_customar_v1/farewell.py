"""Who still has its peers' memory open: a page of host memory that a group's ranks share.

CUDA leaves open what becomes of memory that its owner frees while another process has it open by an IPC handle. So each
rank lets go of its peers' buffers, sets its byte here, and frees its own buffer once it sees all bytes set.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from pathlib import Path

__all__ = ["Farewell", "create", "remove"]

_FOLDER = Path("/dev/shm")  # noqa: S108 - no name is guessed: it has 64 random bits, and is there for an exchange's time
_NAME = "comm-plugin-customar-v1-"
_POLL_S = 0.001


class Farewell:
    """The page as one rank has it mapped.

    Args:
        token: what the first rank's `create` returned.
        rank: this rank's.
        world_size: ranks in the group.

    Raises:
        OSError: it can't be opened.
        ConnectionError: it is another user's.
    """

    def __init__(self, token: str, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        descriptor = os.open(_path(token), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            owner = os.fstat(descriptor).st_uid
            if owner != os.geteuid():
                raise ConnectionError(f"the ranks' processes are of different users: {owner} and {os.geteuid()}")
            self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)

    def leave(self) -> None:
        """Say that this rank has no peer's memory open, and won't have."""
        self._page[self._rank] = 1

    def wait(self, timeout_s: float) -> tuple[int, ...]:
        """Wait until every rank has left; returns those that didn't within `timeout_s` seconds, by group rank."""
        deadline = time.monotonic() + timeout_s
        while True:
            here = tuple(rank for rank in range(self._world_size) if not self._page[rank])
            if not here or time.monotonic() >= deadline:
                return here
            time.sleep(_POLL_S)


def create() -> str:
    """Make a page of which nobody has left; returns the token by which the ranks open it.

    Raises:
        OSError: there is no room, or no right.
    """
    token = secrets.token_hex(8)
    descriptor = os.open(_path(token), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Not just a length: where the room is missing, the first write to the page would be a bus error.
        os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
    except OSError:
        remove(token)
        raise
    finally:
        os.close(descriptor)
    return token


def remove(token: str) -> None:
    """Take the page's name away; who has it open keeps it."""
    _path(token).unlink(missing_ok=True)


def _path(token: str) -> Path:
    if not token.isalnum():
        raise ValueError(f"{token!r} isn't a token of `create`")
    return _FOLDER / f"{_NAME}{token}"
