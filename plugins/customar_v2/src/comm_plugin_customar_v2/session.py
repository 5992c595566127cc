"""A group's session: its buffer, its launches, and what becomes of it when a peer doesn't come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comm_core as comm
import torch
from comm_core.types import rank_label

from comm_plugin_customar_v2 import layout, memory, norm_policy, policy

__all__ = ["Native", "Session", "connect"]

# Of sessions that ended in disorder: their kernels may still run and their peers' still write, so nothing is freed
# before the process ends.
_abandoned: list[Any] = []


class Native(NamedTuple):
    """A session's functions in the native code; csrc/customar_v2.cu says what each does."""

    all_reduce: Any
    all_reduce_out: Any
    all_reduce_add_rms_norm_out: Any
    set_shapes: Any
    set_norm_shapes: Any
    error: Any
    algorithm_of: Any
    abort: Any
    set_early: Any
    attach: Any


class Session:
    """What the hooks work with.

    Attributes:
        all_reduce: (tensor) -> the sum, in a tensor from torch's allocator.
        all_reduce_out: (tensor, out) sums into `out`, which may be `tensor`.
        all_reduce_add_rms_norm_out: (tensor, residual, weight, out, residual_out, eps, weight_offset) sums, adds and
            normalises; `out` may be `tensor`, and `residual_out` the residual. False, with nothing done, where they
            aren't as the hook has them.
        set_early: (early) lets kernels start, or not, while the one before still runs; for comparisons.
        memory_nbytes: of this rank's buffer.
    """

    def __init__(self, native: Native, buffer: memory.Symmetric, context: comm.GroupContext) -> None:
        self.all_reduce = native.all_reduce
        self.all_reduce_out = native.all_reduce_out
        self.all_reduce_add_rms_norm_out = native.all_reduce_add_rms_norm_out
        self.set_early = native.set_early
        self.memory_nbytes = buffer.tensor.nbytes
        self._native: Any = native  # a `Native`; None once it is closed
        self._buffer: memory.Symmetric | None = buffer
        self._context = context

    def use(self, rows: Sequence[policy.Row]) -> None:
        """Serve by these rows from now on; the same on every rank."""
        self._native.set_shapes(policy.flat(rows))

    def use_norm(self, rows: Sequence[norm_policy.NormRow]) -> None:
        """Serve fused calls by these rows from now on; the same on every rank."""
        self._native.set_norm_shapes(norm_policy.flat(rows))

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

    def close(self, orderly: bool) -> None:
        """Let go of everything; after a failure without waiting, and without taking memory from kernels that run."""
        if self._native is None:
            return
        if not orderly:
            self._native.abort()  # kernels that wait for a peer give up within milliseconds
            _abandoned.append((self._native, self._buffer))
        self._native = self._buffer = None
        self.all_reduce = self.all_reduce_out = self.all_reduce_add_rms_norm_out = self.set_early = None


def connect(module: Any, major: int, forced: policy.Row | None, context: comm.GroupContext) -> Session:
    """Allocate, exchange, empty the cells. Collective.

    Args:
        module: the native code.
        major: of the devices' compute capability.
        forced: what the option says.
        context: the group.
    """
    algorithms, known = list(module.constants()), [len(policy.ALGORITHMS), len(norm_policy.ALGORITHMS)]
    if algorithms != known:
        raise RuntimeError(f"the native code has {algorithms} algorithms, not {known}: it is another version's")
    rows = policy.rows_for(major, context.world_size, forced)
    norm_rows = norm_policy.rows_for(major, context.world_size)
    needs = [*rows, *norm_policy.needs(norm_rows)]
    plan = layout.plan(context.world_size, needs, context.memory_budget_nbytes)
    native = Native(
        **module.connect(context.rank, context.world_size, plan.numbers(), context.wait_timeout_s, context.device.index)
    )
    buffer = memory.allocate(plan.nbytes, context.device)
    # Launches are counted from 1; cells begin empty.
    buffer.tensor[: plan.tails_at].zero_()
    buffer.tensor[:8].view(torch.int64).fill_(1 << 20)
    buffer.tensor[plan.tails_at :].fill_(0xFF)
    torch.cuda.synchronize(context.device)
    session = Session(native, buffer, context)
    session.use(rows)
    session.use_norm(norm_rows)
    # What fails on one rank alone has failed by now, and this gathering with it, on all ranks: the exchange waits for
    # all ranks, without a deadline of ours.
    count = torch.cuda.get_device_properties(context.device).multi_processor_count
    counts = context.control.all_gather(count)
    buffer.exchange(context.group)
    native.attach(list(buffer.addresses), min(counts))
    # Nobody launches before every rank has mapped every buffer.
    context.control.barrier()
    return session
