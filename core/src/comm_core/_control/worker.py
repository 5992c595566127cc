"""Call hooks that may hang: in a thread with the group's device and the caller's stream, under a deadline."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, final

import torch

from comm_core._control.deadline import WaitInterruptedError, describe, run_with_deadline
from comm_core._control.journal import journaled

__all__ = ["StandingWorker", "run_on_device"]


def run_on_device(
    call: Callable[[], Any],
    device: torch.device,
    timeout_s: float,
    name: str,
    *,
    synchronize: bool = False,
    on_late: Callable[[Any], object] | None = None,
) -> Any:
    """Call a function in a thread of its own, with a device and the caller's stream; see `run_with_deadline`.

    Args:
        call: the function.
        device: the thread's device.
        timeout_s: the longest wait, in seconds.
        name: the call's name in errors.
        synchronize: whether to wait for the work that `call` queued on the stream.
        on_late: receives a result that arrives after the deadline.

    Returns:
        The result of `call`.
    """
    stream = _current_stream(device)

    def work() -> Any:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            value = call()
            if stream is not None and synchronize:
                stream.synchronize()
            return value

    return run_with_deadline(journaled(name, work), timeout_s, name=name, on_late=on_late)


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class _Job:
    """A call, and its outcome once `finished` can be acquired."""

    def __init__(self, call: Callable[[], Any], stream: torch.cuda.Stream | None) -> None:
        self.call = call
        self.stream = stream
        self.value: Any = None
        self.error: BaseException | None = None
        self.finished = threading.Lock()
        self.finished.acquire()

    def run(self) -> None:
        try:
            self.value = self.call()
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            self.error = error
        self.finished.release()


@final
class StandingWorker:
    """A daemon thread for calls that are too frequent for a new thread each, such as a check after every decode step.

    The thread starts with the first call and ends with this object. A process that was forked gets one of its own.

    Args:
        device: the thread's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] | None = None
        self._late: _Job | None = None  # the job that the thread still works at

    def __del__(self) -> None:
        if self._jobs is not None:
            self._jobs.put(None)

    def run(self, call: Callable[[], Any], timeout_s: float, name: str) -> Any:
        """Call a function in the thread, with the caller's stream, and wait for its result until the deadline.

        Args:
            call: the function.
            timeout_s: the longest wait, in seconds.
            name: the call's name in errors.

        Raises:
            TimeoutError: `call` hasn't returned within `timeout_s`, or an earlier call still hasn't returned.
            RuntimeError: `call` raised a `BaseException` such as `SystemExit`, which is the cause.
            Exception, KeyboardInterrupt: `call` raised it.
            WaitInterruptedError: a signal handler raised its cause meanwhile.
        """
        if self._pid != os.getpid():  # since a fork, which left the thread behind
            self._pid, self._lock, self._jobs, self._late = os.getpid(), threading.Lock(), None, None
        with self._lock:
            if self._late is not None:
                if not self._late.finished.acquire(blocking=False):
                    raise TimeoutError(f"{name}: an earlier call hasn't returned yet")
                self._late = None
            job = self._late = _Job(call, _current_stream(self._device))
            jobs = self._start_thread()
            try:
                jobs.put(job)
                finished = job.finished.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))
            except Exception as error:
                raise WaitInterruptedError from error
            if not finished:
                raise TimeoutError(f"{name} hasn't returned after {timeout_s:g} s")
            self._late = None
        try:
            if job.error is None:
                return job.value
            if isinstance(job.error, (Exception, KeyboardInterrupt)):
                raise job.error
            raise RuntimeError(f"{name} raised {describe(job.error)}") from job.error
        finally:
            # The job holds the error, and the error's traceback holds this frame: a cycle would keep tensors alive.
            del job

    def _start_thread(self) -> queue.SimpleQueue[_Job | None]:
        if self._jobs is None:
            jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
            threading.Thread(target=_work, args=(jobs, self._device), name="comm-core checks", daemon=True).start()
            self._jobs = jobs
        return self._jobs


def _work(jobs: queue.SimpleQueue[_Job | None], device: torch.device) -> None:
    """Run jobs until None; holds no reference to the `StandingWorker`, so that this ends with it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stream = None
    with torch.no_grad():
        while (job := jobs.get()) is not None:
            if job.stream is not None and job.stream != stream:
                stream = job.stream
                torch.cuda.set_stream(stream)
            job.run()
            del job
