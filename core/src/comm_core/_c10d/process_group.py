"""A process group of the backend "comm": sums go to the group's handle, everything else to torch's own backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from comm_core._control.unlisted_group import forget_group
from comm_core._group.api import close

if TYPE_CHECKING:
    from datetime import timedelta

    from comm_core._handle.backend import Backend

__all__ = ["CommProcessGroup"]

# torch's stubs lack some of the names.
_dist: Any = dist
_create_work: Any = _distributed_c10d._create_work_from_future  # type: ignore[attr-defined]  # noqa: SLF001
_AllreduceOptions = _dist.AllreduceOptions
_SUM, _AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
# Sums of CUDA tensors beyond this size that the caller waits for later go to NCCL, in bytes: NCCL has a stream of its
# own, so they overlap with the caller's kernels, as those of DistributedDataParallel do.
_OVERLAPPED_NBYTES = 1 << 20


class CommProcessGroup(dist.ProcessGroup):
    """Serves `all_reduce` with sums and averages by comm_core, and the rest by a plain group of the same ranks.

    Attributes:
        plain: the process group with torch's own backends. It serves all other operations, and is the one that the
            handle was negotiated for.

    Args:
        plain: see above; freed by `shutdown`.
        plain_name: the name that `plain` was made with.
        handle: the handle of `plain`; None if its ranks couldn't negotiate one.
    """

    def __init__(self, plain: dist.ProcessGroup, plain_name: str, handle: Backend | None) -> None:
        super().__init__(plain.rank(), plain.size())  # type: ignore[call-arg]
        self.plain = plain
        self._plain_name = plain_name
        self._handle = handle
        for device in plain._device_types:  # noqa: SLF001 - torch has no public name
            backend: Any = plain._get_backend(device)  # noqa: SLF001
            kind = getattr(dist.ProcessGroup.BackendType, backend.name().upper(), dist.ProcessGroup.BackendType.CUSTOM)
            self._register_backend(device, kind, backend)
            self._set_default_backend(kind)

    def name(self) -> str:
        """Return the backend's name."""
        return "comm"

    def allreduce(self, tensors: Any, opts: Any = None, *more: Any, **named: Any) -> dist.Work | None:  # type: ignore[override]
        """Reduce tensors in place: the operation behind `torch.distributed.all_reduce`.

        Returns:
            The work to wait for; None if `opts` says that the caller doesn't wait.
        """
        if opts.__class__ is not _AllreduceOptions or more or named:
            return self._allreduce_by_arguments(tensors, opts, *more, **named)
        handle = self._handle
        if handle is None or len(tensors) != 1:
            return self.plain.allreduce(tensors, opts)
        reduce_op, tensor = opts.reduceOp, tensors[0]
        waits_later = opts.asyncOp
        if reduce_op == _SUM and not waits_later and not tensor.requires_grad:
            # The most frequent call, without the calls of the rest.
            try:
                handle.all_reduce(tensor, tensor)
            except (TypeError, ValueError):  # as in `_sum`
                return self.plain.allreduce(tensors, opts)
            return None
        overlaps = waits_later and tensor.is_cuda and tensor.nbytes > _OVERLAPPED_NBYTES
        if overlaps or not self._sum(handle, tensor, reduce_op):
            return self.plain.allreduce(tensors, opts)
        return _finished(tensors) if waits_later else None

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        """Reduce several tensors in place: `all_reduce_coalesced`, and the coalescing manager's calls."""
        handle = self._handle
        opts = _dist.AllreduceCoalescedOptions() if opts is None else opts
        if handle is None:
            return self.plain.allreduce_coalesced(list(tensors), opts)
        rest = [tensor for tensor in tensors if not self._sum(handle, tensor, opts.reduceOp)]
        if rest:
            self.plain.allreduce_coalesced(rest, opts).wait()
        return _finished(list(tensors))

    def shutdown(self) -> None:
        """Close the handle and the plain group's backends. Collective, as `torch.distributed.destroy_process_group`."""
        self._close()
        self.plain.shutdown()
        forget_group(self.plain, self._plain_name)

    def abort(self) -> None:
        """Abort the plain group's backends, without waiting for other ranks."""
        self.plain.abort()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle = None
            close(self.plain)

    def _sum(self, handle: Backend, tensor: torch.Tensor, reduce_op: Any) -> bool:
        """Sum or average a tensor in place; return False, on all ranks, if that is for the plain group."""
        # A `ReduceOp` stands on the left: it equals one of its kinds, but no kind equals it.
        average = reduce_op == _AVG
        if not (reduce_op == _SUM or (average and tensor.is_floating_point())):
            return False
        if tensor.requires_grad:
            tensor = tensor.detach()  # torch's backends take it without a word
        try:
            handle.all_reduce(tensor, tensor)
        except (TypeError, ValueError):  # its dtype, layout or device, before anything is sent
            return False
        if average:
            tensor.div_(self.size())
        return True

    def _allreduce_by_arguments(
        self, tensors: Any, op: Any = None, timeout: timedelta | None = None, opts: Any = None
    ) -> dist.Work | None:
        """Serve the other forms of the call: a tensor or several, with an operation and a timeout, or without any."""
        if opts is None:
            opts = _AllreduceOptions()
            opts.reduceOp = _SUM if op is None else op
            if timeout is not None:
                opts.timeout = timeout
        return self.allreduce([tensors] if isinstance(tensors, torch.Tensor) else tensors, opts)


def _finished(tensors: list[torch.Tensor]) -> dist.Work:
    """Return the work of a call that this thread has made: on a GPU, it is done once the current stream has come here.

    A later `wait()` lets the waiting stream wait for that; so does the future.
    """
    device = tensors[0].device
    future: Any = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
    future.set_result(tensors)
    work: dist.Work = _create_work(future)
    return work


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: CommProcessGroup, *arguments: Any, **keywords: Any) -> Any:
        return getattr(self.plain, name)(*arguments, **keywords)

    method.__name__ = name
    method.__doc__ = f"See `torch.distributed.ProcessGroup.{name}`; served by the plain group."
    return method


# What a group does with itself: its place, names, and the backends that are registered above.
_OWN = {
    *("rank", "size", "name", "boxed", "unbox", "shutdown", "abort", "allreduce", "allreduce_coalesced"),
    *("_backend_id", "_get_backend", "_get_backend_name", "_has_hooks", "_id", "_register_backend"),
    *("_set_default_backend", "_set_group_desc", "_set_group_name", "_pybind11_conduit_v1_"),
}
# Everything else is delegated in Python. Otherwise torch's C++ would look for a Python method while it holds the
# interpreter's lock, find none, and call its own group with the lock held, for which Gloo's threads may wait.
for _name in dir(dist.ProcessGroup):
    _function = getattr(dist.ProcessGroup, _name)
    if not _name.startswith("__") and _name not in _OWN and callable(_function) and not isinstance(_function, type):
        setattr(CommProcessGroup, _name, _delegated(_name))
