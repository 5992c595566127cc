"""Asks what may fail in any way, and keeps the reason instead of the exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from comm_core._control.deadline import describe

__all__ = ["attempt"]

T = TypeVar("T")

#: Characters of a reason: the ranks exchange it, and one driver's page of advice would fill the message.
_REASON_CHARS = 160


def attempt(unknown: dict[str, str], field: str, ask: Callable[[], T]) -> T | None:
    """What `ask` returns; where it raises, None, and the reason on one line under `unknown[field]`."""
    try:
        return ask()
    except KeyboardInterrupt:
        raise
    # A driver, its binding or a broken torch fails in every way there is, by `SystemExit` or a compiled module's panic
    # too, and what it can't say is evidence as well.
    except BaseException as error:  # noqa: BLE001
        words = f"NVML: {error}" if type(error).__name__.startswith("NVMLError") else describe(error)
        unknown[field] = words if len(words) <= _REASON_CHARS else words[: _REASON_CHARS - 3] + "..."
        return None
