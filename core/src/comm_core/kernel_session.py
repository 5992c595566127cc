"""The part of a session that doesn't depend on its kernels: late peers, waits, replays after an abort, and the end.

For backends whose CUDA kernels wait for peers by `<comm_core/wait.cuh>`, count launches by `<comm_core/epoch.cuh>`, and
share a buffer of `comm_core.memory` that begins with that counter. A backend derives its session from `KernelSession`
and adds the calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from comm_core import kernels
from comm_core.context import GroupContext
from comm_core.errors import CommError, CommTimeoutError
from comm_core.memory import SharedBuffer
from comm_core.types import rank_label

__all__ = ["KernelSession", "Reports"]

# Native functions and buffers of sessions that were closed after a failure. Their kernels may still run and peers may
# still write, so nothing is freed until the process ends.
_kept_until_exit: list[Any] = []


class Reports(Protocol):
    """The native functions that a `KernelSession` calls; `<comm_core/host.h>` has what they need."""

    def error(self) -> int:
        """Return 0, or 1 + the rank that didn't come in time: `ErrorWord::read`."""

    def waits(self) -> Iterable[int]:
        """Return three numbers for each rank: `WaitCounters::read`."""

    def abort(self) -> None:
        """End the waits of kernels in flight: `ErrorWord::abort`."""


class KernelSession:
    """A session without its calls.

    Attributes:
        native: the native functions, those of `Reports` among them; None once the session is closed.
        buffer: this rank's buffer.
        context: the group.
        memory_nbytes: the size of the buffer.
    """

    def __init__(self, native: Reports, buffer: SharedBuffer, context: GroupContext) -> None:
        self.native: Any = native
        self.buffer = buffer
        self.context = context
        self.memory_nbytes = buffer.nbytes
        self._aborted = False
        self._launches: int | None = None  # the launch counter at the last `check` since `abort`

    def check(self) -> None:
        """Raise if a kernel timed out; reads one word of host memory, or of device memory after `abort`.

        Raises:
            CommTimeoutError: a kernel timed out waiting for a peer, or the peer called with another size or dtype.
            CommError: a kernel has run since the last check after `abort`.
        """
        if self.native is not None and self._aborted:
            self._check_replays()
            return
        late = 0 if self.native is None else self.native.error()
        if late:
            rank = rank_label(late - 1, self.context.global_ranks[late - 1])
            timeout_s = self.context.wait_timeout_s
            raise CommTimeoutError(
                f"rank {rank} didn't come within {timeout_s:g} s, or called with another size or dtype", (late - 1,)
            )

    def _check_replays(self) -> None:
        """Raise if a kernel has counted its launch since the last call; the first call only reads the counter."""
        before, self._launches = self._launches, int(self.buffer.tensor[:8].view(torch.int64))
        if before not in (None, self._launches):
            raise CommError("its kernels ran in the replay of a graph, and their results are wrong")

    def waits(self) -> dict[int, tuple[int, float, float]]:
        """Return this rank's long waits for each peer: their number, total and longest time, in microseconds.

        Reads host memory alone, so it waits for no kernel. A closed session has none.
        """
        return {} if self.native is None else kernels.waits_by_rank(self.native.waits())

    def abort(self) -> None:
        """End the waits of this rank's kernels, as a time-out would. Idempotent."""
        if self.native is not None:
            self._aborted = True
            self.native.abort()  # they end within milliseconds

    def suspend(self) -> None:
        """Give the buffers' memory back; no kernel may use it until `resume`."""
        self.buffer.suspend()

    def resume(self) -> None:
        """Take memory for the buffers again, at the same addresses, with their first contents. Collective."""
        self.buffer.resume()

    def close(self, orderly: bool) -> None:
        """Free the buffers or, if not `orderly`, keep them until the process ends. Idempotent; waits for no peer.

        A derived class drops its calls first.
        """
        if self.native is None:
            return
        native, self.native = self.native, None
        if orderly:
            self.buffer.close()
        else:
            native.abort()  # kernels that wait for a peer end within milliseconds
            _kept_until_exit.append((native, self.buffer))
