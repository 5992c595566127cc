"""A group's session: its buffers, its launches, and the order in which memory is given back."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comm_core as comm
import torch
from comm_core.types import rank_label

from comm_plugin_customar_v1 import layout, policy, teardown

__all__ = ["Session", "connect"]

#: How long a rank waits for its peers to unmap its buffer, in seconds; after that it keeps the buffer until the process
#: ends.
UNMAP_TIMEOUT_S = 10.0
# Native functions of sessions with memory that can't be freed, since kernels may still run or peers still read. They
# are referenced until the process ends.
_kept_until_exit: list[Any] = []


class Session:
    """This rank's part of the group.

    Attributes:
        all_reduce: (tensor) -> the sum, in a tensor from torch's allocator.
        all_reduce_out: (tensor, out) sums into `out`, which may be `tensor`.
        memory_nbytes: the size of this rank's buffer.
    """

    def __init__(
        self, functions: Mapping[str, Callable[..., Any]], memory_nbytes: int, context: comm.GroupContext
    ) -> None:
        self.all_reduce: Any = functions["all_reduce"]
        self.all_reduce_out: Any = functions["all_reduce_out"]
        self.memory_nbytes = memory_nbytes
        self._functions = dict(functions)  # csrc/customar_v1.cu describes them; empty once the session is closed
        self._unmap_flags: teardown.UnmapFlags | None = None
        self._context = context

    def set_rows(self, rows: Sequence[policy.Row]) -> None:
        """Serve by these rows from now on; they must be the same on every rank."""
        self._functions["set_shapes"](policy.flat(rows))

    def algorithm_of(self, nbytes: int) -> str:
        """Return the name of the algorithm that serves a message of `nbytes` bytes."""
        code = self._functions["algorithm_of"](nbytes)
        return next(name for name, number in policy.ALGORITHMS.items() if number == code)

    def check(self) -> None:
        """Raise if a kernel timed out; reads one word of host memory.

        Raises:
            CommTimeoutError: a kernel timed out waiting for a peer, or the peer called with another size or dtype.
        """
        late = self._functions["error"]() if self._functions else 0
        if late:
            rank = rank_label(late - 1, self._context.global_ranks[late - 1])
            timeout_s = self._context.wait_timeout_s
            raise comm.CommTimeoutError(
                f"rank {rank} didn't come within {timeout_s:g} s, or called with another size or dtype", (late - 1,)
            )

    def open_peers(self) -> None:
        """Open every rank's buffer, and test that data written to it and read from it is right. Collective.

        Raises:
            RuntimeError: the driver refuses, or data is wrong.
            OSError: the ranks can't share a page of host memory.
        """
        context, functions = self._context, self._functions
        seed = secrets.randbits(32)
        processors = torch.cuda.get_device_properties(context.device).multi_processor_count
        token = teardown.create() if context.rank == 0 else ""
        try:
            ranks = context.control.all_gather({"token": token, "seed": seed, "processors": processors})
            flags = teardown.UnmapFlags(ranks[0]["token"], context.rank, context.world_size)
            # Before handles are exchanged: a rank that may map a peer's buffer can always say that it has unmapped it.
            context.control.barrier()
        finally:
            if token:
                teardown.remove(token)
        self._unmap_flags = flags
        handles = context.control.all_gather(functions["ipc_handle"]().hex())

        def open_and_write() -> None:
            fewest_processors = min(rank["processors"] for rank in ranks)
            functions["open_peers"]([bytes.fromhex(handle) for handle in handles], fewest_processors)
            functions["write_test_pages"](seed)

        def read() -> None:
            wrong = functions["read_test_pages"]([rank["seed"] for rank in ranks])
            if wrong:
                raise RuntimeError(f"the driver reports peer access, but {wrong}")

        # No rank reads before all have written, and none launches before all have opened every buffer.
        self._run_and_vote(open_and_write)
        self._run_and_vote(read)

    def _run_and_vote(self, step: Callable[[], None]) -> None:
        """Run a step and raise on all ranks if it fails on one: a rank that raised alone would wait for its peers."""
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
        """Give everything back; after a failure wait for no peer, and keep the memory that kernels may still use.

        Raises:
            CommError: a peer still has this rank's buffer mapped, which is then kept.
            RuntimeError: the driver refuses to unmap or free it; likewise.
        """
        functions, self._functions = self._functions, {}
        self.all_reduce = self.all_reduce_out = None
        if not functions:
            return
        if orderly:
            self._free(functions)
        else:
            functions["abort"]()  # kernels that wait for a peer end within milliseconds
            _kept_until_exit.append(functions)

    def _free(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        try:
            functions["unmap_peers"]()
            if self._unmap_flags is not None:
                self._unmap_flags.set()
                ranks = self._unmap_flags.wait(UNMAP_TIMEOUT_S)
                if ranks:
                    listed = ", ".join(rank_label(rank, self._context.global_ranks[rank]) for rank in ranks)
                    raise comm.CommError(
                        f"this rank's buffer of {self.memory_nbytes} bytes is kept until the process ends: after "
                        f"{UNMAP_TIMEOUT_S:g} s it is still mapped by rank {listed}"
                    )
            functions["free"]()
        except BaseException:
            _kept_until_exit.append(functions)
            raise


def connect(module: Any, forced: policy.Row | None, context: comm.GroupContext) -> Session:
    """Allocate a buffer, exchange it with the peers', and test peer access. Collective.

    Args:
        module: the native code.
        forced: the row that the option forces, if any.
        context: the group.

    Raises:
        MemoryError: the budget is too small.
        RuntimeError: the driver refuses, data is wrong, or the native code has another version.
        OSError: the ranks can't share a page of host memory.
    """
    flags_nbytes, test_nbytes, algorithms = module.constants()
    if algorithms != len(policy.ALGORITHMS):
        raise RuntimeError(
            f"the native code has {algorithms} algorithms, not {len(policy.ALGORITHMS)}: it belongs to another version"
        )
    plan = layout.plan(context.memory_budget_nbytes, flags_nbytes, test_nbytes)
    functions = module.connect(
        context.rank, context.world_size, plan.numbers(), context.wait_timeout_s, context.device.index
    )
    session = Session(functions, plan.nbytes, context)
    try:
        # Everything that can fail on one rank alone has happened once this returns, before the first exchange.
        session.set_rows(policy.rows_for(context.world_size, forced))
        session.open_peers()
    except BaseException:
        with contextlib.suppress(comm.CommError, RuntimeError):  # the first error is the one to raise
            session.close(orderly=True)
        raise
    return session
