"""Route tables of a handle: the group's decision, bound to the hooks and sessions that serve its calls."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from comm_core._control.guard import capturing
from comm_core._handle import pieces
from comm_core._handle.profiling import profiled
from comm_core.types import DTYPES, OPS, TERMINAL, Decision, Rule

if TYPE_CHECKING:
    from comm_core._handle.session import Session

__all__ = [
    "BoundHook",
    "CallCounter",
    "CallKey",
    "CaptureRoutes",
    "DeviceDtype",
    "FusedRoutes",
    "ModeRoutes",
    "RouteKey",
    "Routes",
    "RuleHook",
    "bind",
    "composed",
    "new_counter",
]

_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}

#: A device and a dtype. The device is what `Tensor.get_device` returns: the CUDA index, or -1 for the CPU. Creating and
#: hashing a `torch.device` takes four times as long.
DeviceDtype = tuple[int, torch.dtype]
#: The properties of a call's tensors that determine its route: device and dtype, then the number of elements for
#: `all_reduce` or the shape for `all_reduce_add_rms_norm`.
CallKey = tuple[Any, ...]


#: The route of counted calls: a device as in `DeviceDtype`, or the type of one that only torch.distributed serves; a
#: dtype; the backend's name; and the quantised wire, "" for none.
RouteKey = tuple[int | str, torch.dtype, str, str]

#: Counts calls: `for _ in counter: break` counts one. This takes 10 ns, and adding 1 to a number in a list or an object
#: 20 to 25 ns (CPython 3.11).
CallCounter = Iterator[None]

#: A hook with the session to call it on: the hook or the fallback's function, its first argument, the backend's name,
#: and whether it accepts operands that core hasn't validated.
RuleHook = tuple[Callable[..., Any], Any, str, bool]
#: A `RuleHook`, and the counter of the calls with one key. A plain tuple: unpacking a named one takes 60 ns a call
#: longer.
BoundHook = tuple[Callable[..., Any], Any, str, bool, CallCounter]


def new_counter() -> CallCounter:
    """Return a counter of no calls."""
    return itertools.repeat(None, sys.maxsize)


def _counted(counter: CallCounter) -> int:
    """Return the number of calls that were counted."""
    return sys.maxsize - operator.length_hint(counter)


def composed(*_: object) -> None:
    """Stand for the hook of a fused call that no backend covers: core composes it of an all-reduce and a norm."""
    raise AssertionError("a composed call has no hook")


_COMPOSED: RuleHook = (composed, None, TERMINAL, False)
# Far more than the distinct calls of one model.
_MAX_CALL_KEYS = 4096
# Calls with one key that are checked in full before the hot path serves it. The hot path can't afford to look for
# negated views and the like, which takes 100 ns; a program that passes them does so from the start.
_CHECKED_CALLS = 16


class Routes(dict[CallKey, BoundHook]):
    """The hooks that serve one operation in one mode, by call key. The rules are evaluated once for each key.

    Attributes:
        entries: the decision's rules with their hooks, in the order in which they are tried.
    """

    # Serves the calls that no rule takes.
    _default: RuleHook | None = None

    def __init__(self, entries: Mapping[DeviceDtype, tuple[tuple[Rule, RuleHook], ...]]) -> None:
        super().__init__()
        self.entries = entries
        self._calls: dict[CallKey, int] = {}
        self._counters: dict[tuple[CallKey, str, str], CallCounter] = {}
        # The calls and bytes of the counters that were dropped.
        self._dropped: dict[RouteKey, tuple[int, int]] = {}

    def __missing__(self, key: CallKey) -> None:
        """Return None: the first calls with a key are checked in full."""

    def find(self, key: CallKey, *, always_checked: bool = False) -> BoundHook | None:
        """Return the hook for a key that `get` doesn't hold, or None if it has no route; keep it after some calls.

        Args:
            key: the key.
            always_checked: whether `get` mustn't hold the key any more, so that every call with it is checked in full:
                hooks can't get this call's tensors as they are.
        """
        if always_checked:
            self._calls[key] = -sys.maxsize
            self.pop(key, None)
        bound = super().get(key)
        if bound is not None:
            return bound
        arguments = self._rule_arguments(key)
        # No backend serves an empty tensor: the handle sums one zero, or composes the call.
        entries = self.entries.get(key[:2], ()) if arguments[0] else ()
        hook, wire = next(((hook, rule.wire) for rule, hook in entries if rule.takes(*arguments)), (self._default, ""))
        if hook is None:
            return None
        bound = (*hook, self.counter(key, hook[2], wire))
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls >= _CHECKED_CALLS:
            self[key] = bound
        return bound

    def counter(self, key: CallKey, backend: str, wire: str = "") -> CallCounter:
        """Return the counter of the calls with this key that the backend serves, by a quantised wire or by none."""
        counter = self._counters.get((key, backend, wire))
        if counter is None:
            if len(self._counters) >= _MAX_CALL_KEYS:
                self._dropped = self.totals()
                for kept in (self, self._calls, self._counters):
                    kept.clear()
            counter = self._counters[key, backend, wire] = new_counter()
        return counter

    def totals(self) -> dict[RouteKey, tuple[int, int]]:
        """Return the numbers of calls and bytes that were counted so far, by route."""
        found = dict(self._dropped)
        for (key, backend, wire), counter in list(self._counters.items()):  # a copy: another thread may call meanwhile
            route, count = (*key[:2], backend, wire), _counted(counter)
            calls, nbytes = found.get(route, (0, 0))
            found[route] = calls + count, nbytes + count * self._rule_arguments(key)[0]
        return found

    @staticmethod
    def _rule_arguments(key: CallKey) -> tuple[int, ...]:
        """Return the arguments of `Rule.takes` for this key, the bytes first."""
        _, dtype, numel = key
        return (numel * dtype.itemsize,)


class FusedRoutes(Routes):
    """The hooks that serve fused calls in one mode; a call that no backend covers is composed."""

    _default = _COMPOSED

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

    def find(self, key: CallKey, *, always_checked: bool = False) -> BoundHook | None:
        """Call `Routes.find` in the current stream's mode."""
        return self._routes(key).find(key, always_checked=always_checked)

    def counter(self, key: CallKey, backend: str) -> CallCounter:
        """Call `Routes.counter` in the current stream's mode, for no wire; also for a key without a route."""
        routes = self._graph if capturing() and key[0] not in (-1, "cpu") else self._eager
        return routes.counter(key, backend)

    def _routes(self, key: CallKey) -> Routes:
        # CPU tensors have no routes for graphs: they stay eager while a stream captures.
        return self._graph if capturing() and key[:2] in self._graph.entries else self._eager


@dataclasses.dataclass(frozen=True)
class ModeRoutes:
    """The routes of one mode.

    Attributes:
        all_reduce: the routes of `all_reduce`.
        fused: the routes of `all_reduce_add_rms_norm`.
        quant: the routes of `all_reduce_add_rms_norm_quant`.
    """

    all_reduce: Routes
    fused: FusedRoutes
    quant: FusedRoutes

    @classmethod
    def empty(cls) -> ModeRoutes:
        """Return routes that serve no call."""
        return cls(Routes({}), FusedRoutes({}), FusedRoutes({}))


def bind(
    decision: Decision,
    mode: str,
    devices: Mapping[str, torch.device],
    terminal: tuple[Callable[..., torch.Tensor], Any],
    sessions: Mapping[str, Session],
    profiled_title: str = "",
) -> ModeRoutes:
    """Bind the decision's routes of one mode to hooks and sessions.

    Args:
        decision: the group's decision.
        mode: "eager" or "graph".
        devices: the group's devices by device type.
        terminal: the function of the terminal fallback, and its first argument.
        sessions: the connected sessions by backend.
        profiled_title: the group's name, for ranges of profilers around each call; "": no ranges.
    """
    entries: dict[str, dict[DeviceDtype, tuple[tuple[Rule, RuleHook], ...]]] = {op: {} for op in OPS}

    def hook_of(rule: Rule, op: str) -> RuleHook:
        backend = rule.backend
        if backend == TERMINAL:
            if op != "all_reduce":
                return _COMPOSED
            (function, value), checks_operands = terminal, False
        else:
            session = sessions[backend]
            function, value = session.plugin.hooks[op], session.value
            checks_operands = session.checks_operands and op == "all_reduce_add_rms_norm"
        if rule.piece_nbytes is not None:
            function, value, checks_operands = getattr(pieces, op), (function, value, rule.piece_nbytes), False
        if profiled_title:
            function = profiled(function, op, backend, profiled_title)
        return function, value, backend, checks_operands

    for route in decision.routes:
        if route.mode == mode:
            device = devices[route.device_type]
            key = (-1 if device.type == "cpu" else device.index, _TORCH_DTYPES[route.dtype])
            entries[route.op][key] = tuple((rule, hook_of(rule, route.op)) for rule in route.rules)
    plain, *fused = (entries[op] for op in OPS)
    return ModeRoutes(Routes(plain), *map(FusedRoutes, fused))
