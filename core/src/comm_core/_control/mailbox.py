"""Hands open files from process to process on one host, over a Unix socket that is this user's alone.

`pidfd_getfd` would need no socket, but the permission to trace the other process, which containers don't give.
"""

from __future__ import annotations

import array
import errno
import json
import os
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping

__all__ = ["Mailbox"]

# How long a send that found the other's queue full waits for something to take from its own, in milliseconds.
_PAUSE_MS = 5
# The longest note that goes with a file, in bytes; and the words in it, in characters, of which JSON may make six.
_NOTE_NBYTES = 1 << 13
_WORDS_CHARS = 1000
# The peer's queue is full, or too many files are on their way.
_LATER = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)


class Mailbox:
    """A socket in a folder that no other user can enter. For one `swap`.

    Attributes:
        path: where peers send to.
        missing: rank and key of each file that is still to come.

    Raises:
        OSError: no socket can be made here.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="comm_core-")  # mode 0700
        self.path = f"{self._folder}/box"
        self.missing: set[tuple[int, str]] = set()
        self._failed = ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(self.path)
        except OSError:
            self.close()
            raise
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def close(self) -> None:
        """Remove it."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def swap(
        self,
        rank: int,
        paths: Iterable[str],
        outgoing: Mapping[str, Callable[[], int]],
        expected: Iterable[tuple[int, str]],
        take: Callable[[int, str, int], None],
        timeout_s: float,
    ) -> None:
        """Send every file to every peer, and take theirs. All ranks call it; few files are open at any time.

        Args:
            rank: this rank.
            paths: of the peers' boxes.
            outgoing: what opens each file, by its key; the descriptor is closed once it is sent.
            expected: rank and key of each file that is to come.
            take: called with rank, key and descriptor of each, which it closes.
            timeout_s: for all of it, in seconds.

        Raises:
            OSError: a peer's box is gone; as TimeoutError, something didn't come or couldn't be sent.
            RuntimeError: a file couldn't be opened, here or by the peer that was to send it.
        """
        deadline, targets = time.monotonic() + timeout_s, list(paths)
        self.missing = set(expected)
        for key, export in outgoing.items():
            files, words = [], ""
            try:
                files = [export()]
            except (RuntimeError, OSError) as error:
                # The peers wait for it, so they are told.
                self._failed = words = str(error)[:_WORDS_CHARS]
            try:
                for path in targets:
                    while not _sent(self._socket, [rank, key, words], files, path):
                        # Its queue is full, maybe since it waits for this rank to take something.
                        self._receive(take, deadline, _PAUSE_MS)
            finally:
                _close(files)
        while self.missing:
            self._receive(take, deadline, 1000)
        if self._failed:
            raise RuntimeError(self._failed)

    def _receive(self, take: Callable[[int, str, int], None], deadline: float, wait_ms: int) -> None:
        """Take a file, if one comes in time."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"the peers' files didn't come in time, or weren't taken: {sorted(self.missing)[:3]}")
        if not self._poll.poll(min(wait_ms, 1 + int(left_s * 1e3))):
            return
        note, files, _, _ = socket.recv_fds(self._socket, _NOTE_NBYTES, 1, socket.MSG_CMSG_CLOEXEC)
        rank, key, words = json.loads(note)
        if (rank, key) not in self.missing or len(files) != (not words):
            _close(files)
            raise RuntimeError(f"rank {rank} sent what it shouldn't have, or no more files can be open here")
        self.missing.discard((rank, key))
        self._failed = self._failed or words
        for file in files:
            take(rank, key, file)


def _sent(box: socket.socket, note: list[object], files: list[int], path: str) -> bool:
    """Send without waiting; False where the other's queue is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    try:
        box.sendmsg([json.dumps(note).encode()], rights, 0, path)
    except OSError as error:
        if error.errno in _LATER:
            return False
        raise
    return True


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)
