"""What a handle looks up in each call: the plan of its group, bound to the hooks and sessions that serve it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from comm_core._control.guard import capturing
from comm_core.types import DTYPES, TERMINAL, Decision, Rule

if TYPE_CHECKING:
    from comm_core._handle.session import Session

__all__ = ["COMPOSED", "FusedRoutes", "Key", "Kind", "Recording", "Routes", "Served", "Tables", "bind"]

_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}

#: By device and dtype. The device is what a tensor's `get_device` tells, CUDA's index or -1, in a quarter of the time
#: that a `torch.device` takes to be made and hashed.
Key = tuple[int, torch.dtype]
#: What a call's tensors are like, as far as its route depends on it: device and dtype, then of `all_reduce` the bytes,
#: of `all_reduce_add_rms_norm` the shape.
Kind = tuple[Any, ...]


class Served(NamedTuple):
    """What serves a call.

    Attributes:
        hook: the backend's, or the terminal fallback's function.
        session: its first argument.
        backend: the name.
        checks_operands: whether the hook takes operands that core hasn't validated.
    """

    hook: Callable[..., Any]
    session: Any
    backend: str
    checks_operands: bool = False


def _composed(*_: object) -> None:
    raise AssertionError("a composed call has no hook")


#: What serves a fused call that no backend takes: the handle itself.
COMPOSED = Served(_composed, None, TERMINAL)
# Kinds that are kept: more than a model's shapes.
_MOST_KINDS = 4096


class Routes(dict[Kind, Served]):
    """What serves which kind of call in one mode. A kind's rules are gone through once, and their answer is kept.

    Attributes:
        entries: the plan's rules and what serves them, in the order in which they are tried.
    """

    # What no rule takes.
    _otherwise: Served | None = None

    def __init__(self, entries: Mapping[Key, tuple[tuple[Rule, Served], ...]]) -> None:
        super().__init__()
        self.entries = entries

    def find(self, kind: Kind) -> Served | None:
        """What serves a kind that `get` doesn't know yet; None for a device or dtype that has no route."""
        message = self._message(kind)
        # An empty tensor is nobody's: the handle answers it.
        entries = self.entries.get(kind[:2], ()) if message[0] else ()
        served = next((served for rule, served in entries if rule.takes(*message)), self._otherwise)
        if served is not None:
            if len(self) >= _MOST_KINDS:
                self.clear()
            self[kind] = served
        return served

    @staticmethod
    def _message(kind: Kind) -> tuple[int, ...]:
        """A kind as `Rule.takes` has it."""
        return kind[2:]


class FusedRoutes(Routes):
    """The same of fused calls; what no backend takes is composed."""

    _otherwise = COMPOSED

    @staticmethod
    def _message(kind: Kind) -> tuple[int, ...]:
        _, dtype, (num_tokens, hidden_size) = kind
        return num_tokens * hidden_size * dtype.itemsize, num_tokens, hidden_size


class Recording:
    """Routes for calls inside `comm.capture()`: a warm-up there takes the eager one, a captured call the graph's.

    Asking the stream costs 0.3 us or more, which calls outside don't pay.

    Args:
        eager, graph: the routes.
    """

    def __init__(self, eager: Routes, graph: Routes) -> None:
        self._eager = eager
        # Only CUDA tensors have routes for graphs.
        self._graph = graph

    def get(self, kind: Kind) -> Served | None:
        """What serves this kind while the current stream does what it does; None: not known yet."""
        return self._routes(kind).get(kind)

    def find(self, kind: Kind) -> Served | None:
        """As `Routes.find`."""
        return self._routes(kind).find(kind)

    def _routes(self, kind: Kind) -> Routes:
        return self._graph if capturing() and kind[:2] in self._graph.entries else self._eager


@dataclasses.dataclass(frozen=True)
class Tables:
    """The routes of one mode.

    Attributes:
        plain: of `all_reduce`.
        fused: of `all_reduce_add_rms_norm`.
    """

    plain: Routes
    fused: FusedRoutes


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
    found: dict[str, dict[Key, tuple[tuple[Rule, Served], ...]]] = {"all_reduce": {}, "all_reduce_add_rms_norm": {}}

    def serving(backend: str, op: str) -> Served:
        if backend == TERMINAL:
            return Served(*terminal, TERMINAL) if op == "all_reduce" else COMPOSED
        session = sessions[backend]
        checks_operands = session.checks_operands and op == "all_reduce_add_rms_norm"
        return Served(session.plugin.hooks[op], session.value, backend, checks_operands)

    for route in decision.routes:
        if route.mode == mode:
            device = devices[route.device_type]
            key = (-1 if device.type == "cpu" else device.index, _TORCH_DTYPES[route.dtype])
            found[route.op][key] = tuple((rule, serving(rule.backend, route.op)) for rule in route.rules)
    return Tables(Routes(found["all_reduce"]), FusedRoutes(found["all_reduce_add_rms_norm"]))
