"""The errors that this package raises. All are importable from `comm_core`.

```text
CommError                    the base of all below; also a failure of a backend in use
├── BackendUnavailableError  a backend named by argument can't serve the group
├── NegotiationError         the ranks of a group can't agree on one plan
├── CaptureError             a CUDA graph capture asked for what can't be captured
├── CommTimeoutError         a peer didn't answer within a deadline; also a TimeoutError
└── PluginLoadError          a plugin's distribution or its hooks are broken
```

Each text names the failure, the evidence, the consequence and the remedy. A wrong argument (a tensor of another
shape, a rank outside the group) raises the built-in `TypeError` or `ValueError`, on the calling rank, before anything
is sent.
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
    """The base of every error that this package raises itself; also raised when the backend that serves a call fails.

    The text then names the backend, and the cause is the backend's own exception. The group's later calls raise until
    all its ranks have called `comm.recover`; or close it, or end the job.

    `torch.ops.comm_core` raises it for a group without a handle in this process, also after `comm.close`: call
    `comm.get_backend(group)` on all ranks of the group first.
    """


class BackendUnavailableError(CommError):
    """A backend that `get_backend(backends=...)` names can't serve the group; raised on all its ranks.

    The text gives the reason of the rank that failed. Leave the argument out to let the ranks choose, or fix the named
    fault; `comm-core doctor` shows the faults of the installed backends. `comm.pre_capture_init` raises this error if
    it has to drop such a backend.
    """


class NegotiationError(CommError):
    """The ranks of a group can't agree: their settings differ, or one of them failed before it could vote.

    The text lists each rank's setting. Start all ranks with the same arguments and environment variables.
    """


class CaptureError(CommError):
    """A call can't be captured into a CUDA graph, or the capture failed on some rank.

    A call that would build code, allocate permanent memory or wait for other ranks can't be captured. The text names
    the call to make before the capture, usually `comm.get_backend` or `comm.pre_capture_init`.

    At the end of `comm.capture()` it means that another rank's capture failed, or the ranks recorded different calls.
    The text names the rank and its reason. Don't replay graphs of a capture that raised; the next capture works.
    """


class CommTimeoutError(CommError, TimeoutError):
    """Peers didn't answer within the deadline.

    Look at the logs of the ranks in `ranks` first: the rank that raises is usually healthy. If the wait was legitimate,
    raise the deadline (`comm_core.env`).

    Attributes:
        ranks: the group ranks that didn't answer, ascending; empty if unknown.
    """

    ranks: tuple[int, ...] = ()  # also of a plugin's subclass whose `__init__` doesn't call this one's

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class PluginLoadError(CommError):
    """A plugin can't be used.

    Its import raises or hangs, its distribution doesn't fit this release of core, or its hooks break a rule of
    `comm_core.hookspecs`. The text names the plugin, its distribution and version, the fault, and the remedy. A
    negotiation leaves such a plugin out, reports it, and uses the others.
    """
