"""Whether a CUDA graph is being captured: what would build, allocate or wait for other ranks asks first."""

from __future__ import annotations

import sys

from comm_core.errors import CaptureError

__all__ = ["capturing", "refuse_capture"]


def capturing() -> bool:
    """Whether the calling thread's CUDA stream captures; imports nothing, starts no CUDA context."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str, instead: str) -> None:
    """Raise where the calling thread's CUDA stream captures.

    Args:
        what: can't be done now, as the beginning of a sentence.
        instead: what to call, and when: a sentence without its full stop.

    Raises:
        CaptureError: with both.
    """
    if capturing():
        raise CaptureError(f"{what} while a CUDA stream captures. {instead}")
