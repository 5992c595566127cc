"""A group's session: its buffer, the test of peer access, its launches, and its end when a peer times out."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import comm_core as comm
import torch
from comm_core import memory
from comm_core.kernel_session import KernelSession
from comm_core.types import rank_label

from comm_plugin_customar_v1 import layout, policy

if TYPE_CHECKING:
    from comm_core.tuning import VariantChoice

__all__ = ["Native", "Session", "connect"]


class Native(NamedTuple):
    """A session's native functions; csrc/customar_v1.cu describes them."""

    all_reduce: Any
    all_reduce_out: Any
    error: Any
    waits: Any
    algorithm_of: Any
    abort: Any
    set_shapes: Any
    attach: Any
    write_test_pages: Any
    read_test_pages: Any


class Session(KernelSession):
    """This rank's part of the group.

    Attributes:
        all_reduce: (tensor) -> the sum, in a tensor from torch's allocator.
        all_reduce_out: (tensor, out) sums into `out`, which may be `tensor`.
    """

    def __init__(
        self, native: Native, buffer: memory.SharedBuffer, context: comm.GroupContext, forced: policy.Row | None
    ) -> None:
        super().__init__(native, buffer, context)
        self.all_reduce = native.all_reduce
        self.all_reduce_out = native.all_reduce_out
        self._forced = forced
        self._rows = policy.rows_for(context.world_size, forced)

    def set_rows(self, rows: Sequence[policy.Row]) -> None:
        """Serve by these rows from now on; they must be the same on every rank."""
        self.native.set_shapes(policy.flat(rows))

    def variants(self, nbytes: int) -> list[str]:
        """Return the launch shapes that can serve a message; see `policy.variants_of`."""
        return policy.variants_of(self._rows, self.context.world_size, nbytes) if self._forced is None else []

    def use_variants(self, choices: Sequence[VariantChoice]) -> None:
        """Serve by these launch shapes, and by the group's own table elsewhere; by the forced row, if there is one.

        Raises:
            ValueError: no kernel has such a shape.
        """
        world_size = self.context.world_size
        rows = policy.with_choices(policy.rows_for(world_size, self._forced), world_size, choices)
        if self._forced is None:
            self.set_rows(rows)
            self._rows = rows

    def algorithm_of(self, nbytes: int) -> str:
        """Return the name of the algorithm that serves a message of `nbytes` bytes."""
        code = self.native.algorithm_of(nbytes)
        return next(name for name, number in policy.ALGORITHMS.items() if number == code)

    def test_peer_access(self, seeds: Sequence[int]) -> None:
        """Test that data which the ranks write to each other's buffers, and read from them, is right. Collective.

        Args:
            seeds: the number that each rank has drawn for its data, by rank.

        Raises:
            RuntimeError: the driver refuses, or data is wrong, on some rank.
            CommError: a peer failed, or didn't come in time.
        """
        native: Native = self.native

        def read() -> None:
            wrong = native.read_test_pages(list(seeds))
            if wrong:
                raise RuntimeError(f"the driver reports peer access, but {wrong}")

        # No rank reads before all have written.
        self._run_and_vote(lambda: native.write_test_pages(seeds[self.context.rank]))
        self._run_and_vote(read)

    def _run_and_vote(self, step: Callable[[], None]) -> None:
        """Run a step on every rank; if it fails on one, raise that rank's reason on all, and go on on none."""
        reason = ""
        try:
            step()
        except (RuntimeError, ValueError) as error:
            reason = str(error) or repr(error)
        agreement = self.context.control.agree(not reason, reason)
        if not agreement.ok:
            rank, reason = next(iter(agreement.reasons.items()))
            raise RuntimeError(f"rank {rank_label(rank, self.context.global_ranks[rank])}: {reason}")

    def close(self, orderly: bool) -> None:
        """Drop the calls, and end; see `KernelSession.close`."""
        self.all_reduce = self.all_reduce_out = None
        super().close(orderly)


def connect(module: Any, forced: policy.Row | None, context: comm.GroupContext) -> Session:
    """Allocate a buffer, share it with the peers, and test peer access. Collective.

    Args:
        module: the native code.
        forced: the row that the option forces, if any.
        context: the group.

    Raises:
        MemoryError: the budget is too small.
        OSError, RuntimeError: the driver refuses, the ranks can't share memory, data is wrong, or the native code has
            another version.
        ValueError: no kernel has the shape of the forced row.
        CommError: a peer failed, or didn't come in time.
    """
    flags_nbytes, test_nbytes, algorithms = module.constants()
    if algorithms != len(policy.ALGORITHMS):
        raise RuntimeError(
            f"the native code has {algorithms} algorithms, not {len(policy.ALGORITHMS)}: it belongs to another version"
        )
    plan = layout.plan(context.memory_budget_nbytes, flags_nbytes, test_nbytes)
    native = Native(
        **module.connect(context.rank, context.world_size, plan.numbers(), context.wait_timeout_s, context.device.index)
    )
    native.set_shapes(policy.flat(policy.rows_for(context.world_size, forced)))
    count = torch.cuda.get_device_properties(context.device).multi_processor_count
    ranks = context.control.all_gather({"seed": secrets.randbits(32), "processors": count})
    buffer = memory.share(plan.nbytes, context, _set_no_flag)
    try:
        native.attach(list(buffer.addresses), min(rank["processors"] for rank in ranks))
        session = Session(native, buffer, context, forced)
        session.test_peer_access([rank["seed"] for rank in ranks])
    except BaseException:
        # No kernel of this rank runs any more, and a peer's kernel writes to memory that the peer itself maps.
        with contextlib.suppress(OSError, RuntimeError):  # the first error is the one to raise
            buffer.close()
        raise
    return session


def _set_no_flag(buffer: torch.Tensor) -> None:
    """Write a buffer's first contents."""
    # Flags begin at 0 and the launch counter at epoch 1 (comm_core/epoch.cuh), so that no flag seems to be set.
    buffer.zero_()
    buffer[:8].view(torch.int64).fill_(1 << 20)
