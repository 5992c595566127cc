"""Route tables of a handle: the group's decision, bound to the hooks and sessions that serve its calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from comm_core._control.guard import capturing
from comm_core.types import DTYPES, TERMINAL, Decision, Rule

if TYPE_CHECKING:
    from comm_core._handle.session import Session

__all__ = [
    "COMPOSED",
    "BoundHook",
    "CallKey",
    "CaptureRoutes",
    "DeviceDtype",
    "FusedRoutes",
    "ModeRoutes",
    "Routes",
    "bind",
]

_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}

#: A device and a dtype. The device is what `Tensor.get_device` returns: the CUDA index, or -1 for the CPU. Creating and
#: hashing a `torch.device` takes four times as long.
DeviceDtype = tuple[int, torch.dtype]
#: The properties of a call's tensors that determine its route: device and dtype, then the number of elements for
#: `all_reduce` or the shape for `all_reduce_add_rms_norm`.
CallKey = tuple[Any, ...]


#: A hook with the session to call it on: the hook or the fallback's function, its first argument, the backend's name,
#: and whether it accepts operands that core hasn't validated. A plain tuple: unpacking a named one takes 60 ns a call
#: longer.
BoundHook = tuple[Callable[..., Any], Any, str, bool]


def _composed(*_: object) -> None:
    raise AssertionError("a composed call has no hook")


#: Marks a fused call that no backend covers: the handle composes it of an all-reduce and a norm.
COMPOSED: BoundHook = (_composed, None, TERMINAL, False)
# Far more than the distinct calls of one model.
_MAX_CALL_KEYS = 4096
# Calls with one key that are checked in full before the hot path serves it. The hot path can't afford to look for
# gradients and negated views, which take 100 ns; a program that passes them does so from the start.
_CHECKED_CALLS = 16


class Routes(dict[CallKey, BoundHook]):
    """The hooks that serve one operation in one mode, by call key. The rules are evaluated once for each key.

    Attributes:
        entries: the decision's rules with their hooks, in the order in which they are tried.
    """

    # Serves the calls that no rule takes.
    _default: BoundHook | None = None

    def __init__(self, entries: Mapping[DeviceDtype, tuple[tuple[Rule, BoundHook], ...]]) -> None:
        super().__init__()
        self.entries = entries
        self._calls: dict[CallKey, int] = {}

    def __missing__(self, key: CallKey) -> None:
        """Return None: the first calls with a key are checked in full."""

    def find(self, key: CallKey) -> BoundHook | None:
        """Return the hook for a key that `get` doesn't hold, or None if it has no route; keep it after some calls."""
        bound = super().get(key)
        if bound is not None:
            return bound
        arguments = self._rule_arguments(key)
        # No backend serves an empty tensor: the handle sums one zero, or composes the call.
        entries = self.entries.get(key[:2], ()) if arguments[0] else ()
        bound = next((bound for rule, bound in entries if rule.takes(*arguments)), self._default)
        if bound is not None:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls >= _CHECKED_CALLS:
                self[key] = bound
            if len(self._calls) >= _MAX_CALL_KEYS:
                self.clear()
                self._calls.clear()
        return bound

    @staticmethod
    def _rule_arguments(key: CallKey) -> tuple[int, ...]:
        """Return the arguments of `Rule.takes` for this key, the bytes first."""
        _, dtype, numel = key
        return (numel * dtype.itemsize,)


class FusedRoutes(Routes):
    """The hooks that serve fused calls in one mode; a call that no backend covers is composed."""

    _default = COMPOSED

    @staticmethod
    def _rule_arguments(key: CallKey) -> tuple[int, ...]:
        _, dtype, (num_tokens, hidden_size) = key
        return num_tokens * hidden_size * dtype.itemsize, num_tokens, hidden_size


class CaptureRoutes:
    """The routes inside `comm.capture()`: eager ones for a warm-up, the graph's for a call that a stream captures.

    Querying the stream costs at least 0.3 us, so calls outside `comm.capture()` don't query it.

    Args:
        eager, graph: the routes of each mode.
    """

    def __init__(self, eager: Routes, graph: Routes) -> None:
        self._eager = eager
        self._graph = graph

    def get(self, key: CallKey) -> BoundHook | None:
        """Return the hook for this key if the current stream's mode already holds it, else None."""
        return self._routes(key).get(key)

    def __getitem__(self, key: CallKey) -> BoundHook | None:
        """Return the same as `get`."""
        return self._routes(key).get(key)

    def find(self, key: CallKey) -> BoundHook | None:
        """Call `Routes.find` in the current stream's mode."""
        return self._routes(key).find(key)

    def _routes(self, key: CallKey) -> Routes:
        # CPU tensors have no routes for graphs: they stay eager while a stream captures.
        return self._graph if capturing() and key[:2] in self._graph.entries else self._eager


@dataclasses.dataclass(frozen=True)
class ModeRoutes:
    """The routes of one mode.

    Attributes:
        all_reduce: the routes of `all_reduce`.
        fused: the routes of `all_reduce_add_rms_norm`.
    """

    all_reduce: Routes
    fused: FusedRoutes


def bind(
    decision: Decision,
    mode: str,
    devices: Mapping[str, torch.device],
    terminal: tuple[Callable[..., torch.Tensor], Any],
    sessions: Mapping[str, Session],
) -> ModeRoutes:
    """Bind the decision's routes of one mode to hooks and sessions.

    Args:
        decision: the group's decision.
        mode: "eager" or "graph".
        devices: the group's devices by device type.
        terminal: the function of the terminal fallback, and its first argument.
        sessions: the connected sessions by backend.
    """
    entries: dict[str, dict[DeviceDtype, tuple[tuple[Rule, BoundHook], ...]]]
    entries = {"all_reduce": {}, "all_reduce_add_rms_norm": {}}

    def bound_hook(backend: str, op: str) -> BoundHook:
        if backend == TERMINAL:
            return (*terminal, TERMINAL, False) if op == "all_reduce" else COMPOSED
        session = sessions[backend]
        checks_operands = session.checks_operands and op == "all_reduce_add_rms_norm"
        return session.plugin.hooks[op], session.value, backend, checks_operands

    for route in decision.routes:
        if route.mode == mode:
            device = devices[route.device_type]
            key = (-1 if device.type == "cpu" else device.index, _TORCH_DTYPES[route.dtype])
            entries[route.op][key] = tuple((rule, bound_hook(rule.backend, route.op)) for rule in route.rules)
    return ModeRoutes(Routes(entries["all_reduce"]), FusedRoutes(entries["all_reduce_add_rms_norm"]))
