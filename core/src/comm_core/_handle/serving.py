"""The state that a handle reads in each call: the decision, its routes and sessions. Only core changes it."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from comm_core._handle import norm
from comm_core._handle.lookup import BoundHook, CallKey, CaptureRoutes, ModeRoutes, RouteKey, Routes, bind
from comm_core._handle.stopping import STOPPED, describe_stopped, find_stopped, raises_interrupts, tell_peers, text_of
from comm_core._plan.faults import Fault
from comm_core.types import DTYPES, MODES, OPS, Decision, RouteStats, WaitStats

if TYPE_CHECKING:
    from comm_core._control.store import Control
    from comm_core._handle.session import Session
    from comm_core.context import Shapes
    from comm_core.topology import Topology

__all__ = ["Serving"]

# The most groups that a time-out's text names.
_OTHERS = 3
# Every group's `Serving` in this process.
_servings: weakref.WeakSet[Serving] = weakref.WeakSet()
# The shortest time between two looks for other ranks' failures, in seconds: a look takes a round trip to the store.
_PEERS_CHECK_S = 1.0


class Serving:
    """A group's current decision, bound to the sessions that serve it.

    Attributes:
        topology: the group's topology.
        title: the group's name in texts.
        device: the device of the group's main tensors.
        devices: every device that the group serves tensors on.
        decision: the current decision.
        sessions: the connected sessions by backend; empty once the handle refuses calls.
        all_sessions: `sessions`, and those that a later decision left out: graphs captured earlier may still replay
            on them.
        dropped_sessions: sessions that `comm.recover` left open: graphs captured before it must not replay on them.
        failure: the reason why every call raises for good; None while the handle is sound.
        fault: the report of that failure to the other ranks, if the handle can recover from it.
        suspended: whether calls raise until `resume`; False once the handle has failed.
        terminal: the function of the terminal fallback, and its first argument.
        torch_device_types: other device types, which only torch.distributed serves.
        control: the group's control channel; None for one rank.
        wait_timeout_s: the longest that a call waits for a peer outside the backends, in seconds.
        eager: the routes outside captures.
        all_reduce_routes: the routes of `all_reduce` in use.
        fused_routes: the routes of `all_reduce_add_rms_norm` in use.
        quant_routes: the routes of `all_reduce_add_rms_norm_quant` in use.
    """

    def __init__(
        self,
        decision: Decision,
        topology: Topology,
        title: str,
        device: torch.device,
        terminal: tuple[Callable[..., torch.Tensor], Any],
        sessions: Mapping[str, Session],
        *,
        torch_device_types: Collection[str] = (),
        control: Control | None = None,
        wait_timeout_s: float = 0.0,
        profiles: bool = False,
    ) -> None:
        """Serve by `decision`; `terminal` is the function of the terminal fallback, and its first argument."""
        self.topology = topology
        self.title = title
        self.device = device
        self.devices: tuple[torch.device, ...] = ()
        self.all_sessions: list[Session] = []
        self.dropped_sessions: list[Session] = []
        self.failure: str | None = None
        self.fault: Fault | None = None
        self.suspended = False
        self.terminal = terminal
        self.torch_device_types = torch_device_types
        self.control = control
        self.wait_timeout_s = wait_timeout_s
        self._profiled_title = title if profiles else ""
        self._peers_checked_s = 0.0
        _servings.add(self)
        self._in_capture = False
        self.eager = self._graph = ModeRoutes.empty()
        # The calls and bytes by operation, mode and route, without those that the routes in use have counted.
        self._earlier: dict[tuple[str, str, RouteKey], tuple[int, int]] = {}
        self.all_reduce_routes: Routes | CaptureRoutes
        self.fused_routes: Routes | CaptureRoutes
        self.quant_routes: Routes | CaptureRoutes
        self.adopt(decision, sessions)

    def adopt(self, decision: Decision, sessions: Mapping[str, Session]) -> None:
        """Serve by this decision from now on.

        Args:
            decision: the new decision of the group.
            sessions: sessions by backend, at least those that the decision names.
        """
        kinds = self.topology.device_types
        devices = {kind: self.device if kind == self.device.type else torch.device(kind) for kind in kinds}
        self.devices = tuple(devices.values())
        self._earlier = self._counts()
        self.eager = bind(decision, "eager", devices, self.terminal, sessions, self._profiled_title)
        self._graph = bind(decision, "graph", devices, self.terminal, sessions, self._profiled_title)
        self.decision = decision
        self.sessions = dict(sessions)
        self.all_sessions += [session for session in sessions.values() if session not in self.all_sessions]
        self.use_graph_routes(self._in_capture)

    def use_graph_routes(self, on: bool) -> None:
        """Set whether calls query their stream, and take the graph's routes while it captures."""
        self._in_capture = on
        if self.refusal is not None:
            return
        eager, graph = self.eager, self._graph
        self.all_reduce_routes = CaptureRoutes(eager.all_reduce, graph.all_reduce) if on else eager.all_reduce
        self.fused_routes = CaptureRoutes(eager.fused, graph.fused) if on else eager.fused
        self.quant_routes = CaptureRoutes(eager.quant, graph.quant) if on else eager.quant

    def routes_of(self, op: str) -> Routes | CaptureRoutes:
        """Return the routes of an operation in use."""
        if op == "all_reduce":
            return self.all_reduce_routes
        return self.fused_routes if op == "all_reduce_add_rms_norm" else self.quant_routes

    def bind_padded(self, op: str, key: CallKey, bound: BoundHook, count: torch.Tensor) -> BoundHook:
        """Return the hook that sums the first rows, `count` in number; `bound`, which sums all, if there is none.

        A message that is taken in pieces has all its rows summed, since no piece has the rows of the batch.
        """
        function, value, name, checks_operands, _ = bound
        session = self.sessions.get(name)
        if session is None or session.value is not value:
            return bound
        padded = session.padded_value(count)
        if padded is NotImplemented:
            return bound
        # Such a call is exact, also if the route has a wire.
        return function, padded, name, checks_operands, self.routes_of(op).counter(key, name)

    @property
    def refusal(self) -> str | None:
        """The reason why every call raises now; None while the handle serves calls."""
        if self.suspended:
            return f"{self.title} is suspended. Call comm.resume(group) on all its ranks first"
        return self.failure

    @property
    def label(self) -> str:
        """The group's name and whether it is suspended, for texts."""
        return f"{self.title}, suspended" if self.suspended else self.title

    def stats(self) -> tuple[RouteStats, ...]:
        """Return the calls so far, by route and backend; see `Backend.stats`."""
        found = [
            RouteStats(op, mode, _device_type(device), str(dtype).removeprefix("torch."), backend, calls, nbytes, wire)
            for (op, mode, (device, dtype, backend, wire)), (calls, nbytes) in self._counts().items()
            if calls
        ]
        return tuple(sorted(found, key=_order))

    def waits(self) -> tuple[WaitStats, ...]:
        """Return this rank's waits so far, by backend and peer; see `Backend.waits`."""
        found: dict[tuple[str, int], WaitStats] = {}
        for session in list(self.all_sessions):
            if not session.plugin.has("waits") or session.suspended:
                continue
            name = session.plugin.name
            for rank, (waits, total_us, longest_us) in session.plugin.hooks["waits"](session.value).items():
                # Of one backend there may be two sessions: an earlier plan's may still be in graphs.
                before = found.get((name, rank), WaitStats(name, rank, 0, 0.0, 0.0))
                longest = max(before.longest_us, longest_us)
                found[name, rank] = WaitStats(name, rank, before.waits + waits, before.total_us + total_us, longest)
        return tuple(found[peer] for peer in sorted(found) if found[peer].waits)

    def _counts(self) -> dict[tuple[str, str, RouteKey], tuple[int, int]]:
        """Return the calls and bytes so far, by operation, mode and route."""
        counts = dict(self._earlier)
        for mode, routes in zip(MODES, (self.eager, self._graph), strict=True):
            for op, of_op in zip(OPS, (routes.all_reduce, routes.fused, routes.quant), strict=True):
                for route, (calls, nbytes) in of_op.totals().items():
                    earlier_calls, earlier_nbytes = counts.get((op, mode, route), (0, 0))
                    counts[op, mode, route] = earlier_calls + calls, earlier_nbytes + nbytes
        return counts

    def suspend(self) -> None:
        """Make every call raise `CommError` until `resume`."""
        self.suspended = True
        self._use(ModeRoutes.empty())

    def resume(self) -> None:
        """Serve calls again, by the routes of before."""
        self.suspended = False
        self.use_graph_routes(self._in_capture)

    def warm_up(self, shapes: Shapes) -> None:
        """Run the steps that a capture can't contain: NCCL's first call and the norm's compilation. Collective."""
        if self.device.type == "cuda":
            norm.prepare(self.device, shapes.dtype, shapes.hidden_size)
            function, session = self.terminal
            function(session, torch.zeros(1, device=self.device), None)

    @raises_interrupts
    def fail(self, why: str, cause: tuple[str, str, BaseException] | None = None) -> str:
        """Refuse every later call, since this rank's calls no longer match its peers', and tell the peers. Local.

        Args:
            why: the reason, a sentence without its full stop.
            cause: the backend that failed, its hook and the error, if one failed.

        Returns:
            The rank whose handle had stopped before, and its reason; "" if this rank is the first.
        """
        if self.failure is not None:
            return ""
        sessions = list(self.all_sessions)
        self.retire(f"{why}. {STOPPED}")
        self.fault = Fault("", why) if cause is None else Fault.of(*cause)
        # First of all, so that a peer whose wait ends by `abort` isn't the first to say why the handles stop.
        try:
            first = None if self.control is None else tell_peers(self.control, why)
        finally:
            for session in sessions:
                session.abort()
        if first is None or self.control is None:
            return ""
        if first.rank != self.control.rank:
            before = describe_stopped(self.control, first)
            if before not in why:
                self.failure = f"{why}. Before that, {before}. {STOPPED}"
            return before
        self.fault = dataclasses.replace(self.fault, first=True)
        return ""

    def check_peers(self, interval_s: float = _PEERS_CHECK_S) -> None:
        """Refuse every later call if another rank's handle has stopped. Local; looks once in `interval_s` at most."""
        now_s = time.monotonic()
        if self.control is None or self.failure is not None or now_s < self._peers_checked_s + interval_s:
            return
        self._peers_checked_s = now_s
        failed = find_stopped(self.control)
        if failed is not None:
            self.fail(f"{self.title}: {describe_stopped(self.control, failed)}")

    def describe_other_groups(self) -> str:
        """Describe how calls of other groups on the same GPU may have caused a time-out; "" without such groups."""
        others = sorted(
            other.title
            for other in list(_servings)
            if other is not self and other.failure is None and other.device == self.device and other.control is not None
        )
        if not others or self.device.type != "cuda":
            return ""
        return (
            f". Calls of {', '.join(others[:_OTHERS])} use {self.device}, too: calls of two groups on two streams must "
            "be launched in the same order on all ranks, or else each rank may wait for the call that its peer hasn't "
            "room for"
        )

    def describe_failure(self, name: str, hook: str, error: BaseException) -> str:
        """Describe what a hook of the backend `name` raised."""
        return f"backend {name!r} of {self.title} failed in {hook}: {text_of(error) or type(error).__name__}"

    def describe_replay(self, name: str, error: BaseException) -> str:
        """Describe what `check` of the backend `name` raised in one of the `dropped_sessions`."""
        return (
            f"backend {name!r} of {self.title}, in a session that comm.recover has replaced: {text_of(error)}. Graphs "
            "that were captured before comm.recover must not be replayed: capture them again"
        )

    def recover(
        self,
        decision: Decision,
        sessions: Mapping[str, Session],
        control: Control | None,
        dropped: Sequence[Session] = (),
    ) -> None:
        """Serve calls again, by new sessions.

        Args:
            decision: the new decision.
            sessions: the new sessions by backend.
            control: the group's control channel, in a new incarnation.
            dropped: all sessions of before that stay open; `check` asks them for replays.
        """
        self.failure = self.fault = None
        self.control = control
        self.dropped_sessions = list(dropped)
        self.adopt(decision, sessions)

    def retire(self, why: str) -> None:
        """Make every later call raise `CommError(why)`."""
        self.failure = why
        self.fault = None
        self.suspended = False
        self._earlier = self._counts()
        self.eager = self._graph = ModeRoutes.empty()
        self.all_sessions.clear()
        self.sessions = {}
        self._use(self.eager)

    def _use(self, routes: ModeRoutes) -> None:
        """Take every call's route from these."""
        self.all_reduce_routes, self.fused_routes, self.quant_routes = routes.all_reduce, routes.fused, routes.quant


def _device_type(device: int | str) -> str:
    """Return the type of a route's device; see `RouteKey`."""
    return device if isinstance(device, str) else "cpu" if device < 0 else "cuda"


def _order(stats: RouteStats) -> tuple[object, ...]:
    """Return the key that sorts statistics as a decision has its routes; dtypes without a route come last."""
    dtypes = list(DTYPES)
    dtype = dtypes.index(stats.dtype) if stats.dtype in DTYPES else len(dtypes)
    served = stats.dtype, stats.backend, stats.wire
    return OPS.index(stats.op), MODES.index(stats.mode), stats.device_type != "cuda", dtype, *served
