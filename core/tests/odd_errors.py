"""Exceptions with odd methods, such as a plugin may raise."""

from __future__ import annotations

import comm_core as comm


class Textless(Exception):  # noqa: N818 - its name is part of what is checked
    """Can't be turned into a text."""

    def __str__(self) -> str:
        raise ValueError("no text")


class Noteless(Exception):  # noqa: N818 - as above
    """Has notes that `traceback` can't read."""

    @property
    def __notes__(self) -> list[str]:
        raise ValueError("no notes")


class Rankless(comm.CommTimeoutError):
    """Doesn't call the constructor of its base."""

    def __init__(self) -> None:
        pass


def own_cause() -> RuntimeError:
    """Make an error that is its own cause, as `raise error from error` does."""
    error = RuntimeError("no symbol")
    error.__cause__ = error
    return error
