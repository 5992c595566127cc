"""Sums that a caller of `torch.distributed` waits for later: its `Work` objects, and the thread that makes CPU sums."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d

from comm_core.errors import CommTimeoutError

__all__ = ["CudaWork", "QueuedWork", "SumQueue", "finished_work"]

# The pause between two looks of a wait with a timeout, in seconds.
_POLL_S = 0.001
# The longest wait for the end of a thread that has no more calls to make, or whose calls were aborted, in seconds.
_END_S = 1.0


class _SumWork(_distributed_c10d.Work):
    """A sum that a caller waits for; its kinds define `is_completed`, `synchronize` and `get_future`."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the sum. Of a CUDA tensor, the current stream waits, and this process only with a timeout.

        Args:
            timeout: the longest wait of this process; None or 0: none on GPUs, and no limit on CPUs.

        Raises:
            CommTimeoutError: the sum isn't finished in time; it continues.
            CommError: the sum failed.
        """
        if timeout:
            end_s = time.monotonic() + timeout.total_seconds()
            while not self.is_completed():
                if time.monotonic() > end_s:
                    raise CommTimeoutError(
                        f"all_reduce isn't finished after the {timeout.total_seconds():g} s that wait() was given. "
                        "Wait again if its peers may still come"
                    )
                time.sleep(_POLL_S)
        self.synchronize()
        return True

    def block_current_stream(self) -> None:
        """Wait like `synchronize`: a queued sum of CPU tensors can't make a stream wait for it."""
        self.synchronize()

    def is_success(self) -> bool:
        """Return whether the sum is finished, and hasn't failed."""
        return self.is_completed() and self.exception() is None

    def exception(self) -> Exception | None:
        """Return the error with which the sum failed; a queued kernel has none."""
        return None

    def result(self) -> list[torch.Tensor]:
        """Return the summed tensors, after a wait."""
        return self.get_future().wait()  # type: ignore[no-any-return]


class QueuedWork(_SumWork):
    """A sum of CPU tensors that a thread makes.

    Args:
        future: the future of the summed tensors.
    """

    def __init__(self, future: Any) -> None:
        super().__init__()
        self._future = future

    def is_completed(self) -> bool:
        """Return whether the sum is finished, or has failed."""
        return bool(self._future.done())

    def synchronize(self) -> None:
        """Wait until the sum is finished; raise its error if it failed."""
        self._future.wait()

    def get_future(self) -> Any:
        """Return the future of the summed tensors."""
        return self._future

    def exception(self) -> Exception | None:
        """Return the error with which the sum failed, if it has."""
        if self._future.done():
            try:
                self._future.value()
            except Exception as error:  # noqa: BLE001 - whatever the sum raised
                return error
        return None


class CudaWork(_SumWork):
    """A sum of CUDA tensors that has been queued on the current stream of their device.

    Args:
        tensors: the tensors, of one device.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._device = tensors[0].device
        self._stream = torch.cuda.current_stream(self._device)
        self._event = self._stream.record_event()

    def is_completed(self) -> bool:
        """Return whether the GPU has finished the sum."""
        return bool(self._event.query())

    def synchronize(self) -> None:
        """Let the current stream wait for the sum."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def get_future(self) -> Any:
        """Return a future of the summed tensors; the streams of its callbacks wait for the sum."""
        future: Any = torch.futures.Future(devices=[self._device])
        with torch.cuda.stream(self._stream):  # the future's event is recorded on it
            future.set_result(self._tensors)
        return future


def finished_work(tensors: list[torch.Tensor]) -> _SumWork:
    """Return the work of sums that have been made (CPU), or are queued on the current stream (CUDA)."""
    if tensors[0].is_cuda:
        return CudaWork(tensors)
    future: Any = torch.futures.Future()
    future.set_result(tensors)
    return QueuedWork(future)


class SumQueue:
    """Sums that a thread makes one after the other; it starts with the first.

    Attributes:
        last: the future of the last sum that was put; None if there is none to wait for.
    """

    def __init__(self) -> None:
        self.last: Any = None
        self._lock = threading.Lock()  # held while a sum is put
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, call: Callable[[], list[torch.Tensor]]) -> Any:
        """Let the thread make a call; return the future of its result."""
        future: Any = torch.futures.Future()
        with self._lock:
            if self._thread is None:
                # A daemon: a peer that never comes mustn't keep the process alive.
                self._thread = threading.Thread(target=self._work, name="comm-core c10d", daemon=True)
                self._thread.start()
                atexit.register(self.end)
            self.last = future
            self._calls.put((call, future))
        return future

    def finish(self) -> None:
        """Wait until the thread has made the calls that were put before; their futures have the errors."""
        last = self.last
        if last is not None:
            with contextlib.suppress(Exception):
                last.wait()
            with self._lock:
                if self.last is last:
                    self.last = None

    def end(self) -> None:
        """Let the thread end, once it has made all calls; wait for that a little.

        A thread that frees a future while the interpreter ends would abort the process.
        """
        with self._lock:
            self._calls.put(None)
            thread, self._thread = self._thread, None
        atexit.unregister(self.end)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_S)

    def _work(self) -> None:
        while (put := self._calls.get()) is not None:
            call, future = put
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - it is raised where the caller waits
                future.set_exception(error)
            del put, call, future  # the caller's tensors
