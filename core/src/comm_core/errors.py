"""What this package raises.

CommError                    anything below, and a failure of a backend in use
├── BackendUnavailableError  a backend named by argument can't serve the group
├── NegotiationError         the ranks of a group can't agree on one plan
├── CaptureError             a CUDA graph capture asked for what can't be captured
├── CommTimeoutError         a peer didn't answer within a deadline; also a `TimeoutError`
└── PluginLoadError          a plugin's distribution or its hooks are broken

A wrong argument (a tensor of another shape, a rank outside the group) raises the built-in `TypeError` or
`ValueError`, on the calling rank, before anything is sent.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "CaptureError",
    "CommError",
    "CommTimeoutError",
    "NegotiationError",
    "PluginLoadError",
]


class CommError(RuntimeError):
    """The base of every error that this package raises itself."""


class BackendUnavailableError(CommError):
    """A backend that `get_backend(backends=...)` names can't serve the group; raised alike on all its ranks."""


class NegotiationError(CommError):
    """The ranks of a group have no common ground: their settings differ, or one of them failed before it could vote."""


class CaptureError(CommError):
    """Something was asked for while a CUDA graph is captured that can't be captured."""


class CommTimeoutError(CommError, TimeoutError):
    """Peers didn't answer within the deadline.

    Attributes:
        ranks: group ranks that were waited for, ascending; empty where they can't be told.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class PluginLoadError(CommError):
    """A plugin can't be used: its import raises, or its hooks break a rule of `comm_core.hookspecs`."""
