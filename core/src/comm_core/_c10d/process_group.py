"""A process group of the backend "comm": sums go to the group's handle, everything else to torch's own backends."""

from __future__ import annotations

import contextlib
import queue
import threading
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
# In bytes. Asynchronous sums of larger CUDA tensors go to NCCL: its own stream lets them overlap with the caller's
# kernels, as DistributedDataParallel expects.
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
        self._queue = _Queue()
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
            arguments = more if opts is None else (opts, *more)
            return self._allreduce_by_arguments(tensors, *arguments, **named)
        handle = self._handle
        if handle is None or len(tensors) != 1:
            return self.plain.allreduce(tensors, opts)
        reduce_op, tensor = opts.reduceOp, tensors[0]
        if opts.asyncOp:
            return self._start(handle, tensors, opts)
        if self._queue.last is not None:
            self._queue.finish()
        if reduce_op == _SUM and not tensor.requires_grad:
            # Fast path: what `_sum` does, without its call.
            try:
                handle.all_reduce(tensor, tensor)
            except (TypeError, ValueError):
                self._raise_if_stopped(handle)
                return self.plain.allreduce(tensors, opts)
            return None
        return None if self._sum(handle, tensor, reduce_op) else self.plain.allreduce(tensors, opts)

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        """Reduce several tensors in place: `all_reduce_coalesced`, and the coalescing manager's calls."""
        handle, tensors = self._handle, list(tensors)
        opts = _dist.AllreduceCoalescedOptions() if opts is None else opts
        if handle is None or not tensors:
            return self.plain.allreduce_coalesced(tensors, opts)
        self._queue.finish()
        rest = [tensor for tensor in tensors if not self._sum(handle, tensor, opts.reduceOp)]
        if rest:
            self.plain.allreduce_coalesced(rest, opts).wait()
        return _finished(tensors)

    def shutdown(self) -> None:
        """Close the handle and the plain group's backends.

        Collective: it waits for the group's other ranks, as `comm_core.close`.
        """
        try:
            if self._handle is not None:
                self._queue.finish()
                close(self.plain)
                self._handle = None
        finally:
            self._queue.end()
            self.plain.shutdown()
            forget_group(self.plain, self._plain_name)

    def abort(self) -> None:
        """Abort the plain group's backends, without waiting for other ranks."""
        self.plain.abort()

    def _start(self, handle: Backend, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        """Begin a sum that the caller waits for later.

        On CPUs a thread makes it, since it waits for the peers. On GPUs it is queued on the current stream.
        """
        tensor, reduce_op = tensors[0], opts.reduceOp
        if not _is_served(tensor, reduce_op) or (tensor.is_cuda and tensor.nbytes > _OVERLAPPED_NBYTES):
            return self.plain.allreduce(tensors, opts)
        if tensor.is_cpu:
            return _create_work(self._queue.put(lambda: self._sum_or_plainly(handle, tensors, opts)))  # type: ignore[no-any-return]
        self._sum_or_plainly(handle, tensors, opts)
        return _finished(tensors)

    def _sum_or_plainly(self, handle: Backend, tensors: list[torch.Tensor], opts: Any) -> list[torch.Tensor]:
        if not self._sum(handle, tensors[0], opts.reduceOp):
            self.plain.allreduce(tensors, opts).wait()
        return tensors

    def _sum(self, handle: Backend, tensor: torch.Tensor, reduce_op: Any) -> bool:
        """Sum or average a tensor in place; return False, on all ranks alike, if the plain group must serve it."""
        if not _is_served(tensor, reduce_op):
            return False
        if tensor.requires_grad:
            tensor = tensor.detach()  # torch's backends accept it, without a warning
        try:
            handle.all_reduce(tensor, tensor)
        except (TypeError, ValueError):  # its dtype, layout or device, before anything is sent
            self._raise_if_stopped(handle)
            return False
        if reduce_op == _AVG:
            tensor.div_(self.size())
        return True

    @staticmethod
    def _raise_if_stopped(handle: Backend) -> None:
        """Raise the error that is being handled, if the handle has stopped: its peers may wait."""
        if handle.failure is not None:
            raise  # noqa: PLE0704 - see above

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


class _Queue:
    """Sums that a thread makes one after the other; it starts with the first.

    Attributes:
        last: the future of the last sum that was put; None if there is none to wait for.
    """

    def __init__(self) -> None:
        self.last: Any = None
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[[], Any]) -> Any:
        """Let the thread make a call; return the future of its result."""
        if self._thread is None:
            # A daemon: a peer that never comes mustn't keep the process alive.
            self._thread = threading.Thread(target=self._work, name="comm-core c10d", daemon=True)
            self._thread.start()
        future: Any = torch.futures.Future()
        self.last = future
        self._calls.put((call, future))
        return future

    def finish(self) -> None:
        """Wait until the thread has made all calls; their futures have the errors."""
        if self.last is not None:
            with contextlib.suppress(Exception):
                self.last.wait()
            self.last = None

    def end(self) -> None:
        """Let the thread end, once it has made all calls."""
        self._calls.put(None)
        self._thread = None

    def _work(self) -> None:
        for call, future in iter(self._calls.get, None):
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001, PERF203 - it is raised where the caller waits
                future.set_exception(error)


def _is_served(tensor: torch.Tensor, reduce_op: Any) -> bool:
    # A `ReduceOp` stands on the left: it equals one of its kinds, but no kind equals it.
    return bool(reduce_op == _SUM or (reduce_op == _AVG and tensor.is_floating_point()))


def _finished(tensors: list[torch.Tensor]) -> dist.Work:
    """Return the work of sums that have been made (CPU), or are queued on the current stream (CUDA).

    A later `wait()` orders the waiting stream after them; so does the future.
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
