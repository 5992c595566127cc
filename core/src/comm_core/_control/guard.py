"""Checks for a running CUDA graph capture, for calls that build, allocate or wait for other ranks."""

from __future__ import annotations

import sys

from comm_core.errors import CaptureError

__all__ = ["capturing", "raise_if_capturing"]


def capturing() -> bool:
    """Return whether the calling thread's CUDA stream is capturing; imports nothing, starts no CUDA context."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def raise_if_capturing(what: str, instead: str) -> None:
    """Raise `CaptureError` if the calling thread's CUDA stream is capturing.

    Args:
        what: the beginning of a sentence, such as "x can't be loaded".
        instead: the remedy, a sentence without its full stop: the call to make, and when.

    Raises:
        CaptureError: the stream is capturing; the text is made of both.
    """
    if capturing():
        raise CaptureError(f"{what} while a CUDA stream captures. {instead}")
