"""Run code that may never return: a plugin's import, its `connect`, its admission test."""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import logging
import os
import re
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from comm_core._schema import printable

__all__ = [
    "WaitInterruptedError",
    "causes",
    "describe",
    "is_timeout",
    "polls",
    "raises_interrupts",
    "run_with_deadline",
    "text_of",
]


P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

# The shortest and the longest pause between two polls, in seconds: a few round trips to a store; short for a caller.
_POLL_S = (0.002, 0.1)
# The longest that a process that ends waits for its threads, in seconds: far above a quick call of the store.
_EXIT_S = 1.0
# In torch's errors: "Timed out waiting 1800000ms for recv operation", "Connection closed by peer".
_TIMEOUT_TEXT = re.compile("timed out|time-?out|connection (closed|reset) by peer", re.IGNORECASE)

_PROCESS_ENDS = "this process ends"
# The errors by which no thread is started: CPython's "can't start new thread", and the one above.
_NO_THREAD = re.compile(f"new thread|{_PROCESS_ENDS}")

_exiting = threading.Event()
_starting = threading.Lock()
_refusing = False  # whether threads other than the main one may start no more threads here
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class WaitInterruptedError(BaseException):
    """A signal handler of the program raised an exception, the cause of this one, while its thread waited.

    No failure of a plugin or of the store, so no `except Exception` may take it, as with `KeyboardInterrupt`.
    """


def raises_interrupts(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that programs call raise what their signal handler raised, not a `WaitInterruptedError`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except WaitInterruptedError as interrupt:
            error = interrupt.__cause__ or interrupt
        raise error

    return run


def describe(error: BaseException) -> str:
    """Return the type and the text of an exception on one printable line, even if its own methods raise."""
    if isinstance(error, WaitInterruptedError):
        error = error.__cause__ or error
    try:
        lines = traceback.format_exception_only(type(error), error)
    except Exception:  # noqa: BLE001 - foreign code: the exception may override each attribute that `traceback` reads
        lines = [type(error).__name__]
    return printable(" ".join(" ".join(lines).split()))


def text_of(error: BaseException) -> str:
    """Return the text of an exception; if its `__str__` raises, what `describe` returns."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - foreign code, as above
        return describe(error)


def is_timeout(error: BaseException | None) -> bool:
    """Return whether a time-out caused an exception: then the cause may lie on the rank that was waited for.

    Gloo and NCCL report time-outs, and peers that went away after one, by the text of a `RuntimeError` alone.
    """
    return any(isinstance(cause, TimeoutError) or _TIMEOUT_TEXT.search(describe(cause)) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, that one's cause and so on, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # `raise error from error` makes an error its own cause
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def run_with_deadline(
    function: Callable[[], T], timeout_s: float, *, name: str, on_late: Callable[[T], object] | None = None
) -> T:
    """Call `function` in a daemon thread and wait for its result until the deadline.

    A call that misses its deadline can't be stopped: its thread continues and keeps its resources. The caller's
    thread-local state, such as torch's current device, doesn't apply in the thread.

    Args:
        function: called once, without arguments.
        timeout_s: the longest wait, in seconds.
        name: the call's name in the thread's name and in errors: "import of customar_v2".
        on_late: called in that thread with a result that comes after the wait has ended; its exceptions are logged.
            Either the caller gets the result or `on_late` does, never both.

    Returns:
        The result of `function`.

    Raises:
        TimeoutError: `function` hasn't returned within `timeout_s`.
        RuntimeError: `function` raised a `BaseException` such as `SystemExit`, which is the cause; or no thread can be
            started, as in a thread of a process that ends.
        Exception, KeyboardInterrupt: `function` raised it.
        WaitInterruptedError: a signal handler raised its cause meanwhile.
    """
    _end_threads_at_exit()
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    thread = threading.Thread(
        target=_run, args=(future, function, name, on_late), name=f"comm-core {name}", daemon=True
    )
    try:
        with _starting:
            if _refusing and threading.current_thread() is not threading.main_thread():
                raise RuntimeError(_PROCESS_ENDS)
            thread.start()
            _threads.add(thread)
        concurrent.futures.wait([future], min(timeout_s, threading.TIMEOUT_MAX))
    except Exception as error:
        if type(error) is RuntimeError and _NO_THREAD.search(str(error)):
            raise
        raise WaitInterruptedError from error
    finally:
        # The future's lock decides between cancelling here and setting the result in the thread: the first one wins. An
        # interrupted wait cancels too, since this caller won't take the result.
        late = future.cancel()
    if late:
        raise TimeoutError(f"{name} hasn't returned after {timeout_s:g} s")
    try:
        return future.result()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RuntimeError(f"{name} raised {describe(error)}") from error
    finally:
        # The future holds the error, and the error's traceback holds this frame: a cycle that would keep tensors alive.
        del future


def _run(
    future: concurrent.futures.Future[T],
    function: Callable[[], T],
    name: str,
    on_late: Callable[[T], object] | None,
) -> None:
    try:
        value = function()
    except BaseException as error:  # noqa: BLE001 - the future carries it to the caller
        try:
            future.set_exception(error)
        except concurrent.futures.InvalidStateError:
            _log.warning("%s raised after its deadline: %s", name, describe(error))
    else:
        try:
            future.set_result(value)
        except concurrent.futures.InvalidStateError:
            _deliver_late(value, on_late, name)
    finally:
        # A cycle too; see run_with_deadline.
        del future


def _deliver_late(value: T, on_late: Callable[[T], object] | None, name: str) -> None:
    if on_late is None:
        return
    try:
        on_late(value)
    except Exception:  # noqa: BLE001 - it may be a plugin's `close`, and no caller is left to raise to
        _log.warning("can't free the result that %s returned after its deadline", name, exc_info=True)


def polls(timeout_s: float) -> Iterator[None]:
    """Yield at once, then after each of many short pauses, the last time at the deadline; for a wait on another rank.

    Raises:
        RuntimeError: the process ends.
    """
    start = time.monotonic()
    while True:
        yield
        waited_s = time.monotonic() - start
        if waited_s >= timeout_s:
            return
        # In proportion to the time so far: an exchange that is quick isn't slowed down, and a long wait costs little.
        if _exiting.wait(min(max(waited_s / 8, _POLL_S[0]), _POLL_S[1], timeout_s - waited_s)):
            raise RuntimeError(_PROCESS_ENDS)


@functools.cache
def _end_threads_at_exit() -> None:
    atexit.register(_end_threads)
    os.register_at_fork(after_in_child=_renew_lock)


def _renew_lock() -> None:
    global _starting  # noqa: PLW0603 - there is one process
    _starting = threading.Lock()  # the parent may have held it during the fork


def _end_threads() -> None:
    """End the threads that wait for other ranks, and let those in a quick call of the store return.

    A daemon thread that returns from C++ code while the interpreter ends aborts the process. Threads whose function
    hangs are left behind.
    """
    global _refusing  # noqa: PLW0603 - there is one process
    with _starting:
        _refusing = True
    _exiting.set()
    end = time.monotonic() + _EXIT_S
    for thread in tuple(_threads):
        thread.join(max(end - time.monotonic(), 0.0))
    # Functions registered earlier, such as the caller's `comm.close`, come next, and may wait for other ranks.
    _exiting.clear()
