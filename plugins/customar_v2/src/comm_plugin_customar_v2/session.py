"""A group's session: its buffer, its launches, and its end when a peer times out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import comm_core as comm
import torch
from comm_core import memory
from comm_core.kernel_session import KernelSession

from comm_plugin_customar_v2 import layout, norm_policy, policy, shapes

if TYPE_CHECKING:
    from comm_core.tuning import VariantChoice

__all__ = ["Native", "PaddedSession", "Session", "connect"]


class Native(NamedTuple):
    """A session's native functions; csrc/customar_v2.cu describes them."""

    all_reduce: Any
    all_reduce_out: Any
    all_reduce_add_rms_norm_out: Any
    all_reduce_add_rms_norm_quant: Any
    set_shapes: Any
    set_wire_shapes: Any
    set_norm_shapes: Any
    error: Any
    waits: Any
    algorithm_of: Any
    abort: Any
    attach: Any
    padded: Any


class Session(KernelSession):
    """This rank's part of the group.

    Attributes:
        all_reduce: (tensor) -> the sum, in a tensor from torch's allocator.
        all_reduce_out: (tensor, out) sums into `out`, which may be `tensor`.
        all_reduce_add_rms_norm_out: (tensor, residual, weight, out, residual_out, eps, weight_offset) sums, adds and
            normalises; `out` may be `tensor`, and `residual_out` may be `residual`. Returns False, and does nothing, if
            the operands break the hook's preconditions.
        all_reduce_add_rms_norm_quant: (tensor, residual, weight, values, scale, sum, norm, wants_norm, eps,
            weight_offset, form) likewise, and quantises; csrc/customar_v2.cu describes it.
    """

    def __init__(
        self, native: Native, buffer: memory.SharedBuffer, context: comm.GroupContext, tables: shapes.Tables
    ) -> None:
        super().__init__(native, buffer, context)
        self.all_reduce = native.all_reduce
        self.all_reduce_out = native.all_reduce_out
        self.all_reduce_add_rms_norm_out = native.all_reduce_add_rms_norm_out
        self.all_reduce_add_rms_norm_quant = native.all_reduce_add_rms_norm_quant
        self._own_tables = self._tables = tables  # the policy's, and those in use

    def padded(self, num_tokens: torch.Tensor) -> PaddedSession | None:
        """Return the session for padded batches; None if the group has no kernels for them."""
        functions = self.native.padded(num_tokens.data_ptr())
        return None if functions is None else PaddedSession(functions, self.check)

    def set_rows(self, rows: Sequence[policy.Row]) -> None:
        """Serve by these rows from now on; they must be the same on every rank."""
        self.native.set_shapes(policy.flat(rows))

    def set_wire_rows(self, rows: Sequence[policy.Row]) -> None:
        """Serve plain half-precision sums from `WIRE_FROM_NBYTES` on by these rows, the same on every rank."""
        self.native.set_wire_shapes(policy.WIRE_FROM_NBYTES, policy.flat(rows))

    def set_norm_rows(self, rows: Sequence[norm_policy.NormRow]) -> None:
        """Serve fused calls by these rows from now on; they must be the same on every rank."""
        self.native.set_norm_shapes(norm_policy.flat(rows))

    def variants(self, op: str, nbytes: int, num_tokens: int) -> list[str]:
        """Return the launch shapes that can serve a message; see `shapes.variants_of`."""
        return shapes.variants_of(self._tables, op, nbytes, num_tokens)

    def use_variants(self, choices: Sequence[VariantChoice]) -> None:
        """Serve by these launch shapes, and by the group's own tables elsewhere.

        Raises:
            ValueError: no kernel has such a shape; the session serves as before.
        """
        tables = shapes.with_choices(self._own_tables, choices)
        self.set_rows(tables.rows)
        try:
            self.set_norm_rows(tables.norm_rows)
        except ValueError:
            self.set_rows(self._tables.rows)
            raise
        self._tables = tables

    def algorithm_of(self, nbytes: int) -> str:
        """Return the name of the algorithm that serves a message of `nbytes` bytes."""
        code = self.native.algorithm_of(nbytes)
        return next(name for name, number in policy.ALGORITHMS.items() if number == code)

    def close(self, orderly: bool) -> None:
        """Drop the calls, and end; see `KernelSession.close`."""
        self.all_reduce = self.all_reduce_out = None
        self.all_reduce_add_rms_norm_out = self.all_reduce_add_rms_norm_quant = None
        super().close(orderly)


class PaddedSession:
    """Takes a session's place in calls on padded batches; its kernels read the number of real rows on the device.

    Attributes:
        all_reduce: as of `Session`.
        all_reduce_out: as of `Session`.
        all_reduce_add_rms_norm_out: as of `Session`.
        all_reduce_add_rms_norm_quant: as of `Session`.
        check: the session's.
    """

    def __init__(self, functions: Mapping[str, Any], check: Callable[[], None]) -> None:
        self.all_reduce = functions["all_reduce"]
        self.all_reduce_out = functions["all_reduce_out"]
        self.all_reduce_add_rms_norm_out = functions["all_reduce_add_rms_norm_out"]
        self.all_reduce_add_rms_norm_quant = functions["all_reduce_add_rms_norm_quant"]
        self.check = check


def connect(module: Any, topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Allocate a buffer, empty its cells and share it with the peers. Collective.

    Args:
        module: the native code.
        topology: the group's topology, which `policy` finds servable.
        context: the group.

    Raises:
        MemoryError: the budget is too small.
        OSError, RuntimeError: the driver refuses, the ranks can't share memory, or the native code has another version.
        ValueError: no kernel has the shape of the forced row.
        CommError: a peer failed, or didn't come in time.
    """
    algorithms = list(module.constants())
    known = [len(policy.ALGORITHMS | policy.WIRE_ALGORITHMS), len(norm_policy.ALGORITHMS)]
    if algorithms != known:
        raise RuntimeError(f"the native code has {algorithms} algorithms, not {known}: it belongs to another version")
    major = policy.major(topology)
    tables = shapes.tables_for(major, context.world_size, policy.forced_row(topology))
    wire_rows = policy.wire_rows_for(major, context.world_size) if context.wire else ()
    plan = layout.plan(
        context.world_size,
        [*tables.rows, *norm_policy.slot_rows(tables.norm_rows), *wire_rows],
        context.memory_budget_nbytes,
    )
    native = Native(
        **module.connect(context.rank, context.world_size, plan.numbers(), context.wait_timeout_s, context.device.index)
    )
    native.set_shapes(policy.flat(tables.rows))
    native.set_norm_shapes(norm_policy.flat(tables.norm_rows))
    if wire_rows:
        native.set_wire_shapes(policy.WIRE_FROM_NBYTES, policy.flat(wire_rows))
    count = torch.cuda.get_device_properties(context.device).multi_processor_count
    counts = context.control.all_gather(count)
    buffer = memory.share(
        plan.nbytes, context, functools.partial(_empty_cells, plan.tails_at), fabric=policy.needs_fabric(topology)
    )
    native.attach(list(buffer.addresses), min(counts))
    return Session(native, buffer, context, tables)


def _empty_cells(tails_at: int, buffer: torch.Tensor) -> None:
    """Write a buffer's first contents; its cells begin at the offset `tails_at`."""
    # The launch counter begins at epoch 1 (comm_core/epoch.cuh), and all cells begin empty (csrc/cells.cuh).
    buffer[:tails_at].zero_()
    buffer[:8].view(torch.int64).fill_(1 << 20)
    buffer[tails_at:].fill_(0xFF)
