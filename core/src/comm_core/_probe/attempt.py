"""Run queries that may fail in any way, and keep the reason instead of the exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from comm_core._control.deadline import describe
from comm_core._schema import printable, shorten

__all__ = ["try_query"]

T = TypeVar("T")

#: The longest reason, as JSON in bytes: the ranks exchange reasons, and a driver's advice would fill the message.
_REASON_NBYTES = 160


def try_query(unknown: dict[str, str], field: str, query: Callable[[], T]) -> T | None:
    """Return the result of `query`; if it raises, return None and set `unknown[field]` to the reason, on one line."""
    try:
        return query()
    except KeyboardInterrupt:
        raise
    # A driver, its binding or a broken torch may raise anything, `SystemExit` and a compiled module's panic included,
    # and the reason is evidence too.
    except BaseException as error:  # noqa: BLE001
        reason = f"NVML: {error}" if type(error).__name__.startswith("NVMLError") else describe(error)
        unknown[field] = shorten(printable(reason), _REASON_NBYTES)
        return None
