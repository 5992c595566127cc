"""Pass an open file of each rank to every other rank of one machine, over Unix sockets.

A socket has an abstract address, which needs no file system and no PID namespace in common, only a network namespace.
Any process in that namespace can send to it, so each message begins with a secret that the receiver has published in
the job's store. `pidfd_getfd` would need no socket, but it needs the permission to trace the other process, which
containers don't give.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import socket
from collections.abc import Iterator

from comm_core.context import GroupContext
from comm_core.types import rank_label

__all__ = ["exchange_files"]

# The files that each rank sends between two barriers. A rank that is one batch behind has two of them to receive, and a
# socket holds at least ten messages (`net.unix.max_dgram_qlen`).
_BATCH = 5
_SECRET_CHARS = 32
# A message is the receiver's secret, and the sender's rank in decimal.
_MESSAGE_NBYTES = _SECRET_CHARS + 16


@contextlib.contextmanager
def exchange_files(file: int, context: GroupContext) -> Iterator[dict[int, int]]:
    """Send this rank's file to every peer, and yield the descriptors of theirs, by group rank. Collective.

    The descriptors are closed at the end of the block. Messages are sent before a barrier and received after it, so no
    rank waits at its socket.

    Args:
        file: the descriptor of this rank's open file, which stays the caller's to close.
        context: the group; its control channel gives the deadline.

    Raises:
        RuntimeError: a peer's socket can't be reached, or its file didn't arrive.
        CommError: a peer failed, or didn't come in time.
    """
    rank, world_size, secret = context.rank, context.world_size, secrets.token_hex(_SECRET_CHARS // 2)
    received: dict[int, int] = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as box:
            box.setblocking(False)
            box.bind("")  # the kernel chooses a free abstract address
            boxes = context.control.all_gather([box.getsockname().hex(), secret])
            peers = [(rank + step) % world_size for step in range(1, world_size)]
            for start in range(0, len(peers), _BATCH):
                failure = None
                for peer in peers[start : start + _BATCH]:
                    address, theirs = boxes[peer]
                    label = rank_label(peer, context.global_ranks[peer])
                    error = _try_to_send(box, bytes.fromhex(address), f"{theirs}{rank}", file, label)
                    failure = failure or error
                # If a socket is gone because its rank failed, this raises that rank's reason.
                context.control.barrier()
                if failure is not None:
                    raise failure
                _receive_all(box, secret, received)
        missing = [rank_label(peer, context.global_ranks[peer]) for peer in sorted(set(peers) - received.keys())]
        if missing:
            raise RuntimeError(
                f"no open file arrived from rank {', '.join(missing)}: this process has reached its limit of open "
                "files (ulimit -n), or its socket overflowed"
            )
        yield received
    finally:
        for descriptor in received.values():
            os.close(descriptor)


def _try_to_send(box: socket.socket, address: bytes, message: str, file: int, label: str) -> RuntimeError | None:
    """Send a message with an open file to rank `label`, without waiting; return the error instead of raising it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
    try:
        box.sendmsg([message.encode()], rights, 0, address)
    except ConnectionRefusedError:
        return RuntimeError(
            f"the socket of rank {label} can't be reached. Ranks share memory by open files, which they send over Unix "
            "sockets, so their containers must have one network namespace: docker run --network=host or "
            "--network=container:NAME, or one pod"
        )
    except OSError as error:
        return RuntimeError(f"an open file can't be sent to rank {label}: {error}")
    return None


def _receive_all(box: socket.socket, secret: str, received: dict[int, int]) -> None:
    """Receive every message that has arrived; other processes' messages are dropped."""
    while True:
        try:
            message, files, _, _ = socket.recv_fds(box, _MESSAGE_NBYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        begin, rank = message[:_SECRET_CHARS], message[_SECRET_CHARS:]
        is_genuine = secrets.compare_digest(begin, secret.encode()) and rank.isdigit() and int(rank) not in received
        if is_genuine and len(files) == 1:
            received[int(rank)] = files[0]
        else:
            for file in files:
                os.close(file)
