"""Runs code that may never come back: a plugin's import, its `connect`, its admission test."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

__all__ = ["describe", "run_with_deadline"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


def describe(error: BaseException) -> str:
    """The type and the text of an exception on one line, also where its `__str__` raises."""
    return " ".join(" ".join(traceback.format_exception_only(type(error), error)).split())


def run_with_deadline(
    function: Callable[[], T], timeout_s: float, *, name: str, on_late: Callable[[T], object] | None = None
) -> T:
    """Call `function` in a daemon thread and wait for it.

    A call that misses its deadline can't be stopped: its thread goes on, and it keeps what it holds. The caller's
    thread-local state, such as torch's current device, isn't taken along.

    Args:
        function: called once, without arguments.
        timeout_s: how long to wait, in seconds.
        name: what runs, for the thread and for errors: "import of customar_v2".
        on_late: called in that thread with what `function` returned after nobody waited any more; whatever it raises is
            logged. Either the caller gets the value or `on_late` does, never both.

    Returns:
        What `function` returned.

    Raises:
        TimeoutError: it isn't back within `timeout_s`.
        RuntimeError: it raised what isn't an `Exception`, such as `SystemExit`; that is the cause.
        Exception, KeyboardInterrupt: what it raised otherwise.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    thread = threading.Thread(
        target=_run, args=(future, function, name, on_late), name=f"comm-core {name}", daemon=True
    )
    thread.start()
    try:
        concurrent.futures.wait([future], min(timeout_s, threading.TIMEOUT_MAX))
    finally:
        # The future's lock decides: cancelled here or set there, whichever is first; the other learns of it. Also where
        # the wait itself is interrupted, since then nobody takes the value.
        late = future.cancel()
    if late:
        raise TimeoutError(f"{name} isn't back after {timeout_s:g} s")
    try:
        return future.result()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RuntimeError(f"{name} raised {describe(error)}") from error
    finally:
        # The future holds the error, whose traceback holds this frame: a cycle that would keep tensors alive.
        del future


def _run(
    future: concurrent.futures.Future[T],
    function: Callable[[], T],
    name: str,
    on_late: Callable[[T], object] | None,
) -> None:
    try:
        value = function()
    except BaseException as error:  # noqa: BLE001 - a thread's exception reaches nobody unless it is carried over
        try:
            future.set_exception(error)
        except concurrent.futures.InvalidStateError:
            _log.warning("%s raised after its deadline: %s", name, describe(error))
    else:
        try:
            future.set_result(value)
        except concurrent.futures.InvalidStateError:
            _hand_over(value, on_late, name)
    finally:
        # As above.
        del future


def _hand_over(value: T, on_late: Callable[[T], object] | None, name: str) -> None:
    if on_late is None:
        return
    try:
        on_late(value)
    except Exception:  # noqa: BLE001 - it may be a plugin's `close`, and no caller is left to tell
        _log.warning("what %s returned after its deadline can't be given back", name, exc_info=True)
