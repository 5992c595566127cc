"""All-reduce backends as plugins: the ranks of a process group agree on one plan; torch.distributed is the fallback.

```python
import comm_core as comm

backend = comm.get_backend(group)
y = backend.all_reduce(x)
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from comm_core._version import __version__
from comm_core.context import Agreement, ControlChannel, GroupContext, Shapes
from comm_core.errors import (
    BackendUnavailableError,
    CaptureError,
    CommError,
    CommTimeoutError,
    NegotiationError,
    PluginLoadError,
)
from comm_core.hookspecs import hookimpl, hookspec
from comm_core.tokens import TokenCounts, local_num_tokens_non_padded
from comm_core.topology import Device, Host, Link, RankInfo, Topology
from comm_core.types import Available, Candidate, Decision, Range, Route, RouteStats, Rule, Unavailable, WaitStats

if TYPE_CHECKING:
    from comm_core._group.api import capture, close, get_backend, pre_capture_init, recover, resume, suspend
    from comm_core._handle.backend import Backend

__all__ = [
    "Agreement",
    "Available",
    "Backend",
    "BackendUnavailableError",
    "Candidate",
    "CaptureError",
    "CommError",
    "CommTimeoutError",
    "ControlChannel",
    "Decision",
    "Device",
    "GroupContext",
    "Host",
    "Link",
    "NegotiationError",
    "PluginLoadError",
    "Range",
    "RankInfo",
    "Route",
    "RouteStats",
    "Rule",
    "Shapes",
    "TokenCounts",
    "Topology",
    "Unavailable",
    "WaitStats",
    "__version__",
    "capture",
    "close",
    "get_backend",
    "hookimpl",
    "hookspec",
    "local_num_tokens_non_padded",
    "pre_capture_init",
    "recover",
    "resume",
    "suspend",
]

# These need torch: its import takes a second, and it may be broken on a host that `comm-core doctor` examines.
_WITH_TORCH = {
    "Backend": "comm_core._handle.backend",
    "capture": "comm_core._group.api",
    "close": "comm_core._group.api",
    "get_backend": "comm_core._group.api",
    "pre_capture_init": "comm_core._group.api",
    "recover": "comm_core._group.api",
    "resume": "comm_core._group.api",
    "suspend": "comm_core._group.api",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        value = getattr(importlib.import_module(_WITH_TORCH[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
