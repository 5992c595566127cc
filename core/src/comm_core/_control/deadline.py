"""Run code that may never return: a plugin's import, its `connect`, its admission test."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from comm_core._schema import printable

__all__ = ["describe", "run_with_deadline"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


def describe(error: BaseException) -> str:
    """Return the type and the text of an exception on one printable line, even if its `__str__` raises."""
    return printable(" ".join(" ".join(traceback.format_exception_only(type(error), error)).split()))


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
        RuntimeError: `function` raised a `BaseException` such as `SystemExit`, which is the cause.
        Exception, KeyboardInterrupt: `function` raised it.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    thread = threading.Thread(
        target=_run, args=(future, function, name, on_late), name=f"comm-core {name}", daemon=True
    )
    thread.start()
    try:
        concurrent.futures.wait([future], min(timeout_s, threading.TIMEOUT_MAX))
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
