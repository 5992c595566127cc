"""The plan that a handle serves by: core changes it, and the handle reads it in each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from comm_core._handle import norm
from comm_core._handle.lookup import FusedRoutes, Recording, Routes, Tables, bind
from comm_core.types import Decision

if TYPE_CHECKING:
    from comm_core._handle.session import Session
    from comm_core.context import Shapes
    from comm_core.topology import Topology

__all__ = ["Serving"]


class Serving:
    """A group's plan, bound to the sessions that serve it.

    Attributes:
        topology: the group.
        title: names it.
        device: where its main tensors live.
        devices: where its tensors may live.
        decision: what the ranks agreed on.
        sessions: the connected backends, by name; none once the handle doesn't serve any more.
        all_sessions: also those that a later plan leaves out: graphs captured before may still be replayed on them.
        failure: why every call raises; None while the handle serves.
        plain: the routes that `all_reduce` takes now.
        fused: the routes that `all_reduce_add_rms_norm` takes now.
    """

    def __init__(
        self,
        decision: Decision,
        topology: Topology,
        title: str,
        device: torch.device,
        terminal: tuple[Callable[..., torch.Tensor], Any],
        sessions: Mapping[str, Session],
    ) -> None:
        """Args: the attributes of these names; the terminal fallback's function and its session."""
        self.topology = topology
        self.title = title
        self.device = device
        self.devices: tuple[torch.device, ...] = ()
        self.all_sessions: list[Session] = []
        self.failure: str | None = None
        self._terminal = terminal
        self._graphs = False
        self.plain: Routes | Recording
        self.fused: Routes | Recording
        self.adopt(decision, sessions)

    def adopt(self, decision: Decision, sessions: Mapping[str, Session]) -> None:
        """Serve by this plan from now on.

        Args:
            decision: what the ranks agreed on.
            sessions: the backends that it names, and maybe others, by name.
        """
        kinds = self.topology.device_types
        devices = {kind: self.device if kind == self.device.type else torch.device(kind) for kind in kinds}
        self.devices = tuple(devices.values())
        self.eager = bind(decision, "eager", devices, self._terminal, sessions)
        self._graph = bind(decision, "graph", devices, self._terminal, sessions)
        self.decision = decision
        self.sessions = dict(sessions)
        self.all_sessions += [session for session in sessions.values() if session not in self.all_sessions]
        self.use_graph_routes(self._graphs)

    def use_graph_routes(self, on: bool) -> None:
        """Set whether calls ask the stream if it captures, and take the graphs' routes if it does."""
        self._graphs = on
        if self.failure is not None:
            return
        eager, graph = self.eager, self._graph
        self.plain = Recording(eager.plain, graph.plain) if on else eager.plain
        self.fused = Recording(eager.fused, graph.fused) if on else eager.fused

    def warm_up(self, shapes: Shapes) -> None:
        """Do what can't be captured the first time: NCCL's first call, the norm's kernel. Collective."""
        if self.device.type == "cuda":
            norm.prepare(self.device, shapes.dtype, shapes.hidden_size)
            function, session = self._terminal
            function(session, torch.zeros(1, device=self.device), None)

    def retire(self, why: str) -> None:
        """Make every later call raise `CommError(why)`."""
        self.failure = why
        self.eager = self._graph = Tables(Routes({}), FusedRoutes({}))
        self.all_sessions.clear()
        self.plain, self.fused, self.sessions = self.eager.plain, self.eager.fused, {}
