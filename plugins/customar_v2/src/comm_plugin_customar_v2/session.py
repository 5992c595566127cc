"""A group's session: its buffer, its launches, and what becomes of it when a peer doesn't come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comm_core as comm
import torch
from comm_core.types import rank_label

from comm_plugin_customar_v2 import layout, memory, policy

__all__ = ["Session", "connect"]

# Of sessions that ended in disorder: their kernels may still run and their peers' still write, so nothing is freed
# before the process ends.
_abandoned: list[Any] = []


class Session:
    """What the hooks work with.

    Attributes:
        into: (tensor, out, 0) sums into `out`, which may be `tensor`.
        fresh: (tensor, 0) -> the sum, in a tensor from torch's allocator.
        set_early: (early) lets kernels start, or not, while the one before still runs; for comparisons.
        memory_nbytes: of this rank's buffer.
    """

    def __init__(self, functions: Sequence[Any], buffer: memory.Symmetric, context: comm.GroupContext) -> None:
        self.into, self.fresh, self._set_shapes, self._error, self._algorithm_of, self._abort, self.set_early = (
            functions[:7]
        )
        self.memory_nbytes = buffer.tensor.nbytes
        self._buffer: memory.Symmetric | None = buffer
        self._context = context

    def use(self, rows: Sequence[policy.Row]) -> None:
        """Serve by these rows from now on; the same on every rank."""
        self._set_shapes(policy.flat(rows))

    def algorithm_of(self, nbytes: int) -> str:
        """The name of the algorithm that serves a message of `nbytes` bytes."""
        code = self._algorithm_of(nbytes)
        return next(name for name, number in policy.ALGORITHMS.items() if number == code)

    def check(self) -> None:
        """Raise where a kernel gave up; reads one word of the host's memory."""
        missing = 0 if self._error is None else self._error()
        if missing:
            rank = rank_label(missing - 1, self._context.global_ranks[missing - 1])
            raise comm.CommTimeoutError(
                f"rank {rank} didn't come within {self._context.wait_timeout_s:g} s", (missing - 1,)
            )

    def close(self, orderly: bool) -> None:
        """Let go of everything; after a failure without waiting, and without taking memory from kernels that run."""
        if self._buffer is None:
            return
        if not orderly:
            self._abort()  # kernels that wait for a peer give up within milliseconds
            _abandoned.append((self._buffer, self.into))
        self._buffer = None
        self.into = self.fresh = self._set_shapes = self._error = self._algorithm_of = self._abort = self.set_early = (
            None
        )


def connect(module: Any, major: int, forced: policy.Row | None, context: comm.GroupContext) -> Session:
    """Allocate, exchange, empty the cells. Collective.

    Args:
        module: the native code.
        major: of the devices' compute capability.
        forced: what the option says.
        context: the group.
    """
    flags_nbytes, algorithms = module.constants()
    if algorithms != len(policy.ALGORITHMS):
        raise RuntimeError(
            f"the native code has {algorithms} algorithms, not {len(policy.ALGORITHMS)}: it is another version's"
        )
    rows = policy.rows_for(major, context.world_size, forced)
    plan = layout.plan(context.world_size, rows, context.memory_budget_nbytes, flags_nbytes)
    functions = module.connect(
        context.rank, context.world_size, plan.numbers(), context.wait_timeout_s, context.device.index
    )
    buffer = memory.allocate(plan.nbytes, context.device)
    # Flags and counters begin at 0, the first epoch at 1, so that no flag is taken for set; cells begin empty.
    buffer.tensor.zero_()
    buffer.tensor[:8].view(torch.int64).fill_(1 << 20)
    buffer.tensor[plan.tails_at : plan.staging_at].fill_(0xFF)
    torch.cuda.synchronize(context.device)
    session = Session(functions, buffer, context)
    session.use(rows)
    # Whoever fails alone has failed by now, and this gathering with it, on all ranks: the exchange waits for everybody,
    # without a deadline of ours.
    counts = context.control.all_gather(torch.cuda.get_device_properties(context.device).multi_processor_count)
    buffer.exchange(context.group)
    attach = functions[7]
    attach(list(buffer.addresses), min(counts))
    # Nobody launches before every rank has mapped every buffer.
    context.control.barrier()
    return session
