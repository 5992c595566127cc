"""Pass open files between processes of one host, over a Unix socket that is private to this user.

`pidfd_getfd` would need no socket, but it needs the permission to trace the other process, which containers don't give.
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

# How long a sender that found the peer's queue full waits for a message in its own queue, in milliseconds.
_POLL_MS = 5
# The longest message, in bytes, and the longest failure in it, in characters; JSON may expand a character to six bytes.
_MESSAGE_NBYTES = 1 << 13
_FAILURE_CHARS = 1000
# The peer's queue is full, or too many files are in flight.
_RETRY_ERRNOS = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)


class Mailbox:
    """A socket in a folder that no other user can enter. For one `exchange_files`.

    Attributes:
        path: the socket's address, for the peers.
        missing: rank and key of each file that hasn't arrived yet.

    Raises:
        OSError: the socket can't be created.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="comm_core-")  # mode 0700
        self.path = f"{self._folder}/box"
        self.missing: set[tuple[int, str]] = set()
        self._failure = ""
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
        """Close the socket and remove its folder."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def exchange_files(
        self,
        rank: int,
        paths: Iterable[str],
        outgoing: Mapping[str, Callable[[], int]],
        expected: Iterable[tuple[int, str]],
        on_file: Callable[[int, str, int], None],
        timeout_s: float,
    ) -> None:
        """Send every file to every peer, and receive theirs. All ranks call it; few files are open at any time.

        Args:
            rank: this rank.
            paths: the peers' `path`s.
            outgoing: functions that open the files, by key; each descriptor is closed once it is sent.
            expected: rank and key of each file to receive.
            on_file: called with rank, key and descriptor of each received file; it closes the descriptor.
            timeout_s: the deadline of the whole call, in seconds.

        Raises:
            OSError: a peer's mailbox is gone; as TimeoutError, a file didn't arrive or couldn't be sent.
            RuntimeError: a file couldn't be opened, here or by its sender.
        """
        deadline, targets = time.monotonic() + timeout_s, list(paths)
        self.missing = set(expected)
        for key, export in outgoing.items():
            files, failure = [], ""
            try:
                files = [export()]
            except (RuntimeError, OSError) as error:
                # The peers wait for this file, so they get the failure in its place.
                self._failure = failure = str(error)[:_FAILURE_CHARS]
            try:
                for path in targets:
                    while not _try_send(self._socket, [rank, key, failure], files, path):
                        # The peer's queue is full, maybe because the peer waits for this rank to receive.
                        self._receive(on_file, deadline, _POLL_MS)
            finally:
                _close(files)
        while self.missing:
            self._receive(on_file, deadline, 1000)
        if self._failure:
            raise RuntimeError(self._failure)

    def _receive(self, on_file: Callable[[int, str, int], None], deadline: float, wait_ms: int) -> None:
        """Receive one file, if one arrives within `wait_ms`."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(
                f"files didn't arrive in time, or peers didn't receive this rank's; missing: {sorted(self.missing)[:3]}"
            )
        if not self._poll.poll(min(wait_ms, 1 + int(left_s * 1e3))):
            return
        message, files, _, _ = socket.recv_fds(self._socket, _MESSAGE_NBYTES, 1, socket.MSG_CMSG_CLOEXEC)
        rank, key, failure = json.loads(message)
        if (rank, key) not in self.missing or len(files) != (not failure):
            _close(files)
            raise RuntimeError(
                f"rank {rank} sent an unexpected message, or this process has reached its limit of open files"
            )
        self.missing.discard((rank, key))
        self._failure = self._failure or failure
        for file in files:
            on_file(rank, key, file)


def _try_send(box: socket.socket, message: list[object], files: list[int], path: str) -> bool:
    """Send without waiting; return False if the peer's queue is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    try:
        box.sendmsg([json.dumps(message).encode()], rights, 0, path)
    except OSError as error:
        if error.errno in _RETRY_ERRNOS:
            return False
        raise
    return True


def _close(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)
