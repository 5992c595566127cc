"""A group's session: its buffers, its launches, and what becomes of it when a peer doesn't come."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import comm_core as comm
import torch
from comm_core.types import rank_label

from comm_plugin_customar_v1 import farewell, layout, policy

__all__ = ["Native", "Session", "connect"]

#: How long the peers may take to let go of this rank's buffer before it is kept for good, in seconds.
PATIENCE_S = 10.0
# Of sessions that ended in disorder: their kernels may still run and their peers' still read, so nothing is freed
# before the process ends.
_abandoned: list[Any] = []


class Native(NamedTuple):
    """A session's functions in the native code, as csrc/customar_v1.cu tells."""

    into: Any
    fresh: Any
    error: Any
    algorithm_of: Any
    abort: Any
    set_shapes: Any
    handle: Any
    attach: Any
    write_letters: Any
    read_letters: Any
    unmap: Any
    free: Any


class Session:
    """What the hooks work with.

    Attributes:
        into: (tensor, out) sums into `out`, which may be `tensor`.
        fresh: (tensor) -> the sum, in a tensor from torch's allocator.
        memory_nbytes: of this rank's buffer.
    """

    def __init__(self, native: Native, memory_nbytes: int, context: comm.GroupContext) -> None:
        self.into = native.into
        self.fresh = native.fresh
        self.memory_nbytes = memory_nbytes
        self._native: Any = native  # a `Native`; None once it is closed
        self._farewell: farewell.Farewell | None = None
        self._context = context

    def algorithm_of(self, nbytes: int) -> str:
        """The name of the algorithm that serves a message of `nbytes` bytes."""
        code = self._native.algorithm_of(nbytes)
        return next(name for name, number in policy.ALGORITHMS.items() if number == code)

    def check(self) -> None:
        """Raise where a kernel gave up; reads one word of the host's memory."""
        missing = 0 if self._native is None else self._native.error()
        if missing:
            rank = rank_label(missing - 1, self._context.global_ranks[missing - 1])
            raise comm.CommTimeoutError(
                f"rank {rank} didn't come within {self._context.wait_timeout_s:g} s", (missing - 1,)
            )

    def open_peers(self) -> None:
        """Open every rank's buffer, and see that what is written there and read from there is right. Collective.

        Raises:
            RuntimeError: the driver refuses, or the memory isn't what it seems.
            OSError: the ranks can't share a page of host memory.
        """
        context, native = self._context, self._native
        number = secrets.randbits(32)
        processors = torch.cuda.get_device_properties(context.device).multi_processor_count
        token = farewell.create() if context.rank == 0 else ""
        try:
            ranks = context.control.all_gather({"token": token, "number": number, "processors": processors})
            page = farewell.Farewell(ranks[0]["token"], context.rank, context.world_size)
            # Before a handle goes out: whoever may open a peer's buffer can say when it has let go of it.
            context.control.barrier()
        finally:
            if token:
                farewell.remove(token)
        self._farewell = page
        handles = context.control.all_gather(native.handle().hex())

        def open_and_write() -> None:
            native.attach([bytes.fromhex(handle) for handle in handles], min(rank["processors"] for rank in ranks))
            native.write_letters(number)

        def read() -> None:
            wrong = native.read_letters([rank["number"] for rank in ranks])
            if wrong:
                raise RuntimeError(f"the driver reports peer access, but {wrong}")

        # Nobody reads before all have written; nor launches before all have opened every buffer.
        self._together(open_and_write)
        self._together(read)

    def _together(self, step: Callable[[], None]) -> None:
        """Take a step and vote on it: who raised alone would wait for peers that don't know of it to let go."""
        reason = ""
        try:
            step()
        except (RuntimeError, ValueError) as error:
            reason = str(error) or repr(error)
        agreement = self._context.control.agree(not reason, reason)
        if not agreement.ok:
            rank, reason = next(iter(agreement.reasons.items()))
            raise RuntimeError(f"rank {rank_label(rank, self._context.global_ranks[rank])}: {reason}")

    def close(self, orderly: bool) -> None:
        """Let go of everything; after a failure without waiting, and without taking memory from kernels that run.

        Raises:
            CommError: a peer still has this rank's buffer open, which is then kept.
            RuntimeError: the driver refuses to close or free; likewise.
        """
        if self._native is None:
            return
        native, self._native = self._native, None
        self.into = self.fresh = None
        if not orderly:
            native.abort()  # kernels that wait for a peer give up within milliseconds
            _abandoned.append(native)
            return
        self._give_back(native)

    def discard(self) -> None:
        """Give back what an incomplete session has, as far as the peers let go of it."""
        if self._native is not None:
            native, self._native = self._native, None
            self.into = self.fresh = None
            # Another error is already on its way.
            with contextlib.suppress(comm.CommError, RuntimeError):
                self._give_back(native)

    def _give_back(self, native: Native) -> None:
        try:
            native.unmap()
            if self._farewell is not None:
                self._farewell.leave()
                ranks = self._farewell.wait(PATIENCE_S)
                if ranks:
                    listed = ", ".join(rank_label(rank, self._context.global_ranks[rank]) for rank in ranks)
                    raise comm.CommError(
                        f"this rank's buffer of {self.memory_nbytes} bytes stays until the process ends: after "
                        f"{PATIENCE_S:g} s it is still open on rank {listed}"
                    )
            native.free()
        except BaseException:
            _abandoned.append(native)
            raise


def connect(module: Any, forced: policy.Row | None, context: comm.GroupContext) -> Session:
    """Allocate, exchange, and test peer access. Collective.

    Args:
        module: the native code.
        forced: what the option says.
        context: the group.
    """
    flags_nbytes, letters_nbytes, algorithms = module.constants()
    if algorithms != len(policy.ALGORITHMS):
        raise RuntimeError(
            f"the native code has {algorithms} algorithms, not {len(policy.ALGORITHMS)}: it is another version's"
        )
    plan = layout.plan(context.memory_budget_nbytes, flags_nbytes, letters_nbytes)
    functions = module.connect(
        context.rank, context.world_size, plan.numbers(), context.wait_timeout_s, context.device.index
    )
    native = Native(*functions)
    session = Session(native, plan.nbytes, context)
    try:
        # Whoever fails alone does so by here, before the exchange.
        native.set_shapes(policy.flat(policy.rows_for(context.world_size, forced)))
        session.open_peers()
    except BaseException:
        session.discard()
        raise
    return session
