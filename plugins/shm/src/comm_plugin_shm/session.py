"""A group's session: the memory that its ranks share, and the functions that work on it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import comm_core as comm
import torch
from comm_core import kernels
from comm_core.types import rank_label

from comm_plugin_shm import policy

__all__ = ["Session", "connect"]

# `AllReduce::kDiffers` and `Cause` in csrc/protocol.h.
_DIFFERS = -2
_STOPPED = 1
_FOUND_DIFFERENCE = 2


class Session:
    """This rank's part of the group.

    Attributes:
        all_reduce: (input address, output address, numel, dtype code) -> 0, or the result that `raise_failure` takes.
        memory_nbytes: the size of the shared memory, which all ranks map.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        memory_nbytes: int,
        pids: tuple[int, ...],
        context: comm.GroupContext,
    ) -> None:
        self.all_reduce: Any = functions["all_reduce"]
        self._message: Any = functions["message"]
        self._abort: Any = functions["abort"]
        self._waits: Any = functions["waits"]
        self._round_trip_s: Any = functions["round_trip_s"]
        self.memory_nbytes = memory_nbytes
        self._pids = pids
        self._context = context

    def limits(self) -> dict[str, float]:
        """Measure what bounds this backend on this machine, in microseconds. Collective; takes a tenth of a second.

        Each is the best of several rounds, since other programs may take the processors in some.
        """
        nbytes = 16 << 20  # a call reads each byte of its input, and writes each byte of its output
        source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
        code = policy.DTYPE_CODES[torch.uint8]
        kernel = functools.partial(self.all_reduce, source.data_ptr(), target.data_ptr(), 1 << 10, code)
        return {
            "a flag's way from one rank to another": min(self._round_trip_s(1000) for _ in range(10)) / 2 * 1e6,
            "its kernel alone, on 1 KiB": min(_timed(kernel, 1000) for _ in range(9)) * 1e6,
            "a copy of 16 MiB": min(_timed(lambda: target.copy_(source), 1) for _ in range(20)) * 1e6,
        }

    def waits(self) -> dict[int, tuple[int, float, float]]:
        """Return this rank's waits for each peer: their number, total and longest time, in microseconds.

        A wait of about a microsecond is part of every exchange, and doesn't count.
        """
        return {} if self._waits is None else kernels.waits_by_rank(self._waits())

    def abort(self) -> None:
        """Make every later call on any rank raise, and the peers' waits for this rank end. Idempotent."""
        if self._abort is not None:
            self._abort()

    def close(self, orderly: bool) -> None:
        """Unmap the shared memory, which lives as long as the native functions. Idempotent."""
        if not orderly:
            self.abort()
        self.all_reduce = self._message = self._abort = self._waits = self._round_trip_s = None

    def raise_failure(self, result: int, numel: int, dtype: torch.dtype) -> NoReturn:
        """Raise the error that a call's result stands for.

        Args:
            result: what `all_reduce` returned, unless it is 0.
            numel: elements of this rank's tensor.
            dtype: the dtype of this rank's tensor.

        Raises:
            CommTimeoutError: a rank timed out, or its process has ended.
            CommError: a rank stopped after a failure, or passed another tensor.
        """
        if result <= _DIFFERS:
            peer = _DIFFERS - result
            their_numel, their_code = divmod(self._message(peer), 256)
            their_dtype = next(dtype for dtype, code in policy.DTYPE_CODES.items() if code == their_code)
            raise comm.CommError(
                f"the ranks made different calls: {self._label(peer)} reduced {_describe(their_numel, their_dtype)}, "
                f"this rank {_describe(numel, dtype)}. All ranks must make the same calls in the same order; "
                "COMM_CORE_DEBUG=1 shows the first that differs"
            )
        cause, rank = result >> 8, (result & 0xFF) - 1
        if cause == _STOPPED:
            raise comm.CommError(f"{self._label(rank)} stopped after a failure")
        if cause == _FOUND_DIFFERENCE:
            raise comm.CommError(f"{self._label(rank)} found that another rank made a different call")
        pid = self._pids[rank]
        why = "has ended" if _has_ended(pid) else f"didn't come within {self._context.wait_timeout_s:g} s"
        raise comm.CommTimeoutError(f"{self._label(rank)}, process {pid}, {why}", (rank,))

    def _label(self, rank: int) -> str:
        return f"rank {rank_label(rank, self._context.global_ranks[rank])}"


def _describe(numel: int, dtype: torch.dtype) -> str:
    return f"{numel} element{'' if numel == 1 else 's'} of {dtype}"


def connect(module: Any, context: comm.GroupContext) -> Session:
    """Create memory without a name on the first rank, and map it on every rank. Collective.

    The memory is a memfd, which the other ranks open through /proc. It has no name in /dev/shm, so nothing is left
    behind, whichever process dies when; and a container's limit on /dev/shm doesn't limit its size.

    Args:
        module: the native code.
        context: the group.

    Raises:
        ConnectionError: the ranks are on different machines.
        OSError: the memory can't be created or opened.
        RuntimeError: it can't be mapped.
    """
    nbytes = int(module.segment_nbytes(context.world_size, policy.CHUNK_NBYTES))
    # Random, so that a process on a clone of this machine can't be mistaken for the first rank.
    name = f"comm-plugin-shm-{secrets.token_hex(8)}"
    created = _create(name, nbytes) if context.rank == 0 else -1
    opened = -1
    functions = None
    try:
        mine = {
            "pid": os.getpid(),
            "name": name,
            "descriptor": created,
            "processors": sorted(os.sched_getaffinity(0)),
        }
        peers = context.control.all_gather(mine)
        opened = _open(peers[0]["pid"], peers[0]["descriptor"], peers[0]["name"])
        pids = tuple(peer["pid"] for peer in peers)
        functions = module.connect(
            opened,
            context.rank,
            list(pids),
            policy.CHUNK_NBYTES,
            policy.TWO_SHOT_NBYTES,
            context.wait_timeout_s,
            policy.spins([peer["processors"] for peer in peers]),
        )
        # The first rank keeps its descriptor open until every rank has opened it.
        context.control.barrier()
    except BaseException:
        # The exception's traceback keeps this frame, and the frame would keep the mapping.
        functions = None
        raise
    finally:
        for descriptor in (created, opened):
            if descriptor >= 0:
                os.close(descriptor)
    return Session(functions, nbytes, pids, context)


def _timed(call: Callable[[], object], repeats: int) -> float:
    """Return the mean time of `repeats` calls, in seconds."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _create(name: str, nbytes: int) -> int:
    """Create a memfd of a fixed size; returns its descriptor."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    # No process can shrink it under the others, which would die of a bus error at their next access.
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def _open(pid: int, descriptor: int, name: str) -> int:
    """Open another process's memfd by an ordinary open, which the kernel allows only to the same user.

    Raises:
        ConnectionError: the descriptor refers to something else.
        OSError: it can't be opened.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    target = str(Path(f"/proc/self/fd/{opened}").readlink())
    if target != f"/memfd:{name} (deleted)":
        os.close(opened)
        raise ConnectionError(f"{path} is {target}, not the first rank's memory: the ranks are on different machines")
    return opened


def _has_ended(pid: int) -> bool:
    """Say whether a process is gone, or ends: by its pidfd, as the native code, or where there is none by its state."""
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if select.select([descriptor], [], [], 0)[0]:
                return True
        finally:
            os.close(descriptor)
    try:
        # The state follows the name, which is in parentheses and may hold any character.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True
