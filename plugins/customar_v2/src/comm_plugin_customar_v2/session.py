"""A group's session: its buffer, its launches, and what becomes of it when a peer doesn't come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import comm_core as comm
import torch
from comm_core import registration
from comm_core.types import rank_label

from comm_plugin_customar_v2 import capture, layout, memory, norm_policy, policy

__all__ = ["Session", "connect"]

#: `kNotRegistered` in comm_core/registered.cuh: beyond every rank.
NOT_REGISTERED = 1 << 16

# Of sessions that ended in disorder: their kernels may still run and their peers' still write, so nothing is freed
# before the process ends.
_abandoned: list[Any] = []


class Session:
    """What the hooks work with.

    Attributes:
        into: (tensor, out, 0) sums into `out`, which may be `tensor`. Within `capturing` another function.
        fresh: (tensor, 0) -> the sum, in a tensor from torch's allocator. Likewise.
        norm_into: (tensor, residual, weight, out, residual_out, eps, weight_offset) sums, adds and normalises; `out`
            may be `tensor`, and `residual_out` the residual. False, with nothing done, where they aren't as the hook
            has them.
        set_early: (early) lets kernels start, or not, while the one before still runs; for comparisons.
        memory_nbytes: of this rank's buffer, and of the table of inputs.
    """

    def __init__(self, functions: Sequence[Any], buffer: memory.Symmetric, context: comm.GroupContext) -> None:
        self.into, self.fresh, self._set_shapes, self._error, self._algorithm_of, self._abort, self.set_early = (
            functions[:7]
        )
        self.norm_into, self._set_norm_shapes = functions[9]()
        self.memory_nbytes = buffer.tensor.nbytes
        self._buffer: memory.Symmetric | None = buffer
        self._context = context
        self.registry: registration.Registry | None = None
        self._captured: tuple[policy.Row, ...] = ()
        self._set_registered: Any = None

    def use(self, rows: Sequence[policy.Row]) -> None:
        """Serve by these rows from now on; the same on every rank."""
        self._set_shapes(policy.flat(rows))

    def use_norm(self, rows: Sequence[norm_policy.NormRow]) -> None:
        """Serve fused calls by these rows from now on; the same on every rank."""
        self._set_norm_shapes(norm_policy.flat(rows))

    def algorithm_of(self, nbytes: int) -> str:
        """The name of the algorithm that serves a message of `nbytes` bytes."""
        code = self._algorithm_of(nbytes)
        return next(name for name, number in policy.ALGORITHMS.items() if number == code)

    def register(self, registry: registration.Registry, set_registered: Any) -> None:
        """Have a table of inputs; the same on every rank."""
        self.registry, self._set_registered = registry, set_registered
        self.memory_nbytes += registry.table.nbytes

    def use_captured(self, rows: Sequence[policy.Row]) -> None:
        """Let captured calls that these rows serve by a pull read their peers' inputs; the same on every rank.

        Raises:
            ValueError: there is no table of inputs.
        """
        if self.registry is None:
            raise ValueError("inputs can't be registered in this group")
        self._set_registered(policy.flat(rows), self.registry.table.data_ptr())
        self._captured = tuple(rows)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Calls on streams that capture are recorded with their inputs' addresses; see `capture_ctx` in the hooks."""
        if self._buffer is None or self.registry is None:
            yield
            return
        plain = self.into, self.fresh
        recorder = capture.Recorder(*plain, self.registry.take, self._captured)
        self.into, self.fresh = recorder.into, recorder.fresh
        try:
            with self.registry.capture():
                yield
        finally:
            if self._buffer is not None:  # not closed meanwhile
                self.into, self.fresh = plain

    def check(self) -> None:
        """Raise where a kernel gave up; reads one word of the host's memory."""
        missing = 0 if self._error is None else self._error()
        if missing == NOT_REGISTERED:
            raise comm.CaptureError(
                "a graph was replayed whose capture didn't end well: nobody told its calls where the peers' inputs "
                "are, so their sums are wrong. Close the group's handle, and capture again with a new one"
            )
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
            _abandoned.append((self._buffer, self.into, self.registry))
        elif self.registry is not None:
            self.registry.close()
        self._buffer = self.registry = None
        self.into = self.fresh = self._set_shapes = self._error = self._algorithm_of = self._abort = self.set_early = (
            None
        )
        self.norm_into = self._set_norm_shapes = None


def connect(
    module: Any, major: int, forced: policy.Row | None, context: comm.GroupContext, *, shareable: bool = False
) -> Session:
    """Allocate, exchange, empty the cells. Collective.

    Args:
        module: the native code.
        major: of the devices' compute capability.
        forced: what the option says.
        context: the group.
        shareable: whether peers can read each other's tensors, as far as the topology tells.
    """
    flags_nbytes, *algorithms = module.constants()
    known = [len(policy.ALGORITHMS), len(norm_policy.ALGORITHMS)]
    if algorithms != known:
        raise RuntimeError(f"the native code has {algorithms} algorithms, not {known}: it is another version's")
    rows = policy.rows_for(major, context.world_size, forced)
    norm_rows = norm_policy.rows_for(major, context.world_size)
    captured = policy.captured_rows_for(major, context.world_size, forced) if shareable else ()
    registry = _registry(module, context) if captured else None
    budget_nbytes = context.memory_budget_nbytes - (registry.table.nbytes if registry else 0)
    needs = [*rows, *norm_policy.needs(norm_rows)]
    plan = layout.plan(context.world_size, needs, budget_nbytes, flags_nbytes, captured)
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
    session.use_norm(norm_rows)
    # Whoever fails alone has failed by now, and this gathering with it, on all ranks: the exchange waits for everybody,
    # without a deadline of ours.
    count = torch.cuda.get_device_properties(context.device).multi_processor_count
    gathered = context.control.all_gather([count, registry.problem() if registry else ""])
    buffer.exchange(context.group)
    attach, set_registered = functions[7:9]
    attach(list(buffer.addresses), min(count for count, _ in gathered))
    # What one rank's allocator can't share none reads in place.
    if registry is not None and not any(problem for _, problem in gathered):
        session.register(registry, set_registered)
        session.use_captured(captured)
    # Nobody launches before every rank has mapped every buffer.
    context.control.barrier()
    return session


def _registry(module: Any, context: comm.GroupContext) -> registration.Registry:
    return registration.Registry(context, registration.PeerMemory(*module.peer_memory(context.device.index)))
