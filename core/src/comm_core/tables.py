"""What a handle looks up in each call: the plan of its group, bound to the hooks and sessions that serve it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from comm_core._capturing import capturing
from comm_core.types import DTYPES, TERMINAL, Decision

if TYPE_CHECKING:
    from comm_core.establish import Session

__all__ = ["FusedEntry", "Key", "PlainEntry", "Recording", "Tables", "bind"]

# Past every tensor's size, in bytes, so that a rule without an upper end is compared like the others.
_NO_LIMIT = 1 << 62
_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}

#: By device and dtype, so that one look-up finds the route and notices what has none. The device is what a tensor's
#: `get_device` tells, CUDA's index or -1, in a quarter of the time that a `torch.device` takes to be made and hashed.
Key = tuple[int, torch.dtype]
#: (lowest bytes, highest bytes, multiple of bytes, hook, its session, the backend's name)
PlainEntry = tuple[int, int, int, Callable[..., torch.Tensor], Any, str]
#: (…, most tokens, multiple of the hidden size)
FusedEntry = tuple[int, int, int, Callable[..., tuple[torch.Tensor, torch.Tensor]], Any, str, int, int]


@dataclasses.dataclass(frozen=True)
class Tables:
    """The entries of one mode, in the order in which they are tried.

    Attributes:
        plain: of `all_reduce`; the last entry takes every size.
        fused: of `all_reduce_add_rms_norm`; what no entry takes is composed.
    """

    plain: Mapping[Key, tuple[PlainEntry, ...]]
    fused: Mapping[Key, tuple[FusedEntry, ...]]


class Recording(dict[Key, Any]):
    """A table for calls inside `comm.capture()`: a warm-up there takes the eager route, a captured call the graph's.

    Asking the stream costs 0.3 us or more, which calls outside don't pay.

    Args:
        eager, graph: the tables.
        note: called at each look-up for a captured call.
    """

    def __init__(self, eager: Mapping[Key, Any], graph: Mapping[Key, Any], note: Callable[[], None]) -> None:
        super().__init__(eager)
        # Only CUDA tensors have routes for graphs.
        self._graph = graph
        self._note = note

    def get(self, key: Key, default: Any = None) -> Any:
        """The entries for this key and what the current stream does."""
        if capturing():
            self._note()
            return self._graph[key] if key in self._graph else super().get(key, default)
        return super().get(key, default)


def bind(
    decision: Decision,
    mode: str,
    devices: Mapping[str, torch.device],
    terminal: tuple[Callable[..., torch.Tensor], Any],
    sessions: Mapping[str, Session],
) -> Tables:
    """The tables of one mode.

    Args:
        decision: the group's plan.
        mode: "eager" or "graph".
        devices: by device type.
        terminal: the function of the terminal fallback and its session.
        sessions: by backend.
    """
    plain: dict[Key, tuple[PlainEntry, ...]] = {}
    fused: dict[Key, tuple[FusedEntry, ...]] = {}
    for route in decision.routes:
        if route.mode != mode:
            continue
        device = devices[route.device_type]
        key = (-1 if device.type == "cpu" else device.index, _TORCH_DTYPES[route.dtype])
        entries: list[Any] = []
        for rule in route.rules:
            # An empty tensor is nobody's: the handle answers it.
            bounds = (max(rule.min_nbytes, 1), rule.max_nbytes or _NO_LIMIT, rule.multiple_nbytes)
            if rule.backend != TERMINAL:
                session = sessions[rule.backend]
                served_by = (session.plugin.hooks[route.op], session.value, rule.backend)
            elif route.op == "all_reduce":
                served_by = (*terminal, TERMINAL)
            else:
                continue  # composed by the handle
            limits = () if route.op == "all_reduce" else (rule.max_tokens or _NO_LIMIT, rule.hidden_multiple)
            entries.append((*bounds, *served_by, *limits))
        if route.op == "all_reduce":
            plain[key] = tuple(entries)
        else:
            fused[key] = tuple(entries)
    return Tables(plain, fused)
