"""A process group of the backend "comm": sums go to the group's handle, everything else to torch's own backends."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from comm_core._c10d.work import CudaWork, QueuedWork, SumQueue, finished_work
from comm_core._control.unlisted_group import forget_group
from comm_core._group.api import close
from comm_core._group.close import abort_handle
from comm_core._handle.checks import check_out
from comm_core._handle.operators import find_handle

if TYPE_CHECKING:
    from datetime import timedelta

    from comm_core._handle.backend import Backend

__all__ = ["CommProcessGroup"]

# torch's stubs lack some of the names.
_dist: Any = dist
_AllreduceOptions = _dist.AllreduceOptions
_SUM, _AVG = dist.ReduceOp.SUM, dist.ReduceOp.AVG
# In bytes. Asynchronous sums of larger CUDA tensors have a stream of their own, to overlap with the caller's kernels as
# DistributedDataParallel expects. Smaller ones take less time than the change of streams.
_OVERLAPPED_NBYTES = 1 << 20


class CommProcessGroup(dist.ProcessGroup):
    """Serves `all_reduce` with sums and averages by comm_core, and the rest by a plain group of the same ranks.

    The group's current handle serves the sums: the one that `comm_core.get_backend` returns for the group. While it has
    none, because the ranks couldn't negotiate one or closed it, the plain group serves them.

    Attributes:
        plain: the process group with torch's own backends. It serves all other operations, and is the one that the
            handle is negotiated for.

    Args:
        plain: see above; freed by `shutdown` and `abort`. It has this group's name.
        plain_name: the name that `plain` was made with.
    """

    def __init__(self, plain: dist.ProcessGroup, plain_name: str) -> None:
        super().__init__(plain.rank(), plain.size())  # type: ignore[call-arg]
        self.plain = plain
        self._plain_name = plain_name
        self._name: str = plain.group_name
        # Held in each call of the handle, which serves one thread at a time. A thread that calls within a call gets the
        # handle's error rather than a deadlock.
        self._lock = threading.RLock()
        self._acquire, self._release = self._lock.acquire, self._lock.release
        self._queue = SumQueue()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._has_nccl = False
        for device in plain._device_types:  # noqa: SLF001 - torch has no public name
            backend: Any = plain._get_backend(device)  # noqa: SLF001
            kind = getattr(dist.ProcessGroup.BackendType, backend.name().upper(), dist.ProcessGroup.BackendType.CUSTOM)
            self._has_nccl = self._has_nccl or backend.name() == "nccl"
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
            arguments = more if opts is None else (opts, *more)
            return self._allreduce_by_arguments(tensors, *arguments, **named)
        handle = find_handle(self._name)
        if handle is None or len(tensors) != 1:
            return self._after_queued(functools.partial(self.plain.allreduce, tensors, opts))
        reduce_op, tensor = opts.reduceOp, tensors[0]
        if opts.asyncOp:
            return self._start(handle, tensors, opts)
        if self._queue.last is not None:
            self._queue.finish()
        if reduce_op == _SUM and not tensor.requires_grad:
            # Fast path: what `_sum` does, without its call; a `with` statement would take twice as long as these two.
            self._acquire()
            try:
                handle.all_reduce(tensor, tensor)
            except (TypeError, ValueError):
                self._raise_unless_torch_can(handle, tensor)
            else:
                return None
            finally:
                self._release()
            return self.plain.allreduce(tensors, opts)
        return None if self._sum(handle, tensor, reduce_op) else self.plain.allreduce(tensors, opts)

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        """Reduce several tensors in place: `all_reduce_coalesced`, and the coalescing manager's calls."""
        handle, tensors = find_handle(self._name), list(tensors)
        opts = _dist.AllreduceCoalescedOptions() if opts is None else opts
        if handle is None or not tensors:
            return self._after_queued(functools.partial(self.plain.allreduce_coalesced, tensors, opts))
        self._queue.finish()
        rest = [tensor for tensor in tensors if not self._sum(handle, tensor, opts.reduceOp)]
        if rest:
            self.plain.allreduce_coalesced(rest, opts).wait()
        return finished_work(tensors)

    def shutdown(self) -> None:
        """Close the handle and the plain group's backends.

        Collective: it waits for the group's other ranks, as `comm_core.close` and as long.
        """
        try:
            self._queue.finish()
            close(self.plain)
        finally:
            self._queue.end()
            self.plain.shutdown()
            forget_group(self.plain, self._plain_name)

    def abort(self) -> None:
        """Abort the handle and the plain group's backends, without waiting for other ranks.

        Sums that wait for a peer raise, here and on the other ranks.
        """
        try:
            abort_handle(self.plain)
        finally:
            self.plain.abort()
            self._queue.end()
            forget_group(self.plain, self._plain_name)

    def _start(self, handle: Backend, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        """Begin a sum that the caller waits for later. It takes the same route as one that ends before the call does.

        On CPUs a thread makes the sum, since it waits for the peers. On GPUs it is queued on a stream.
        """
        tensor = tensors[0]
        if not _is_served(tensor, opts.reduceOp):
            return self._after_queued(functools.partial(self.plain.allreduce, tensors, opts))
        if not tensor.is_cuda:
            return QueuedWork(self._queue.put(lambda: self._sum_or_delegate(handle, tensors, opts)))
        if tensor.nbytes <= _OVERLAPPED_NBYTES:
            return CudaWork(self._sum_or_delegate(handle, tensors, opts))
        stream = self._stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            work = CudaWork(self._sum_or_delegate(handle, tensors, opts))
        tensor.record_stream(stream)  # its memory isn't reused before the sum is finished
        return work

    def _after_queued(self, call: Callable[[], dist.Work]) -> dist.Work:
        """Make a collective call of the plain group after all sums that were queued before.

        Torch may serve those by collectives of the plain group, and all ranks must begin these in one order. So the
        call joins the queue. The caller goes on, as other calls of its program may let the queued sums' peers come.
        """
        last = self._queue.last
        if last is None or last.done():
            return call()
        if self._has_nccl:  # it would be queued on the current stream of the thread
            self._queue.finish()
            return call()
        return QueuedWork(self._queue.put(functools.partial(_finish, call)))

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of the large asynchronous sums. Its priority is high: other kernels needn't end first."""
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        return stream

    def _sum_or_delegate(self, handle: Backend, tensors: list[torch.Tensor], opts: Any) -> list[torch.Tensor]:
        """Reduce a tensor in place, by the plain group if the handle can't; return the list of it."""
        if not self._sum(handle, tensors[0], opts.reduceOp):
            self.plain.allreduce(tensors, opts).wait()
        return tensors

    def _sum(self, handle: Backend, tensor: torch.Tensor, reduce_op: Any) -> bool:
        """Sum or average a tensor in place; return False, on all ranks alike, if the plain group must serve it."""
        if not _is_served(tensor, reduce_op):
            return False
        if tensor.requires_grad:
            tensor = tensor.detach()  # torch's backends accept it, without a warning
        average = reduce_op == _AVG
        # As NCCL and Gloo do: NCCL scales before the sum, so that float16 doesn't overflow, and Gloo after it.
        operand = tensor / self.size() if average and tensor.is_cuda else tensor
        try:
            with self._lock:
                handle.all_reduce(operand, tensor)
        except (TypeError, ValueError):  # its dtype, layout or device, before anything is sent
            self._raise_unless_torch_can(handle, tensor)
            return False
        if average and not tensor.is_cuda:
            tensor.div_(self.size())
        return True

    @staticmethod
    def _raise_unless_torch_can(handle: Backend, tensor: torch.Tensor) -> None:
        """Raise the error that is being handled, if the handle has stopped: its peers may wait.

        Raises:
            TypeError, ValueError: the tensor has no memory, or several elements at one address; Gloo would write to
                memory that isn't the tensor's.
        """
        if handle.failure is not None:
            raise  # noqa: PLE0704 - see above
        check_out(tensor, tensor, "tensor")

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


def _is_served(tensor: torch.Tensor, reduce_op: Any) -> bool:
    # A `ReduceOp` stands on the left: it equals one of its kinds, but no kind equals it.
    return bool(reduce_op == _SUM or (reduce_op == _AVG and tensor.is_floating_point()))


def _finish(call: Callable[[], Any]) -> list[torch.Tensor]:
    """Make a collective call, and wait for it; return the tensors that it has written."""
    work: Any = call()
    if work is None:
        return []
    work.wait()
    try:
        return work.get_future().value()  # type: ignore[no-any-return]
    except RuntimeError:  # some works of Gloo have no future
        return []


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: CommProcessGroup, *arguments: Any, **keywords: Any) -> Any:
        call = functools.partial(getattr(self.plain, name), *arguments, **keywords)
        return self._after_queued(call) if name in COLLECTIVES else call()

    method.__name__ = name
    method.__doc__ = f"See `torch.distributed.ProcessGroup.{name}`; served by the plain group."
    return method


#: The delegated methods that every rank calls, in one order. A message (`send`, `recv`) waits for no sum: the peer may
#: join the sum after it.
COLLECTIVES = {
    *("broadcast", "reduce", "scatter", "gather", "barrier", "monitored_barrier", "alltoall", "alltoall_base"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "all_to_all_single"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
}
# Not delegated: the group's rank, size and names, its registered backends, and the methods defined above.
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
