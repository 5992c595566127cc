"""The outcome of a group's negotiation, from which `comm.pre_capture_init` goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from comm_core._group.membership import Membership
from comm_core._handle.session import Session
from comm_core._plan.decide import Slate
from comm_core._plugins.discovery import Plugin
from comm_core.context import Shapes
from comm_core.topology import Topology
from comm_core.types import Decision

__all__ = ["NegotiatedGroup"]


@dataclasses.dataclass(frozen=True)
class NegotiatedGroup:
    """How a negotiation ended.

    Attributes:
        topology: what the ranks reported.
        decision: what they agreed on.
        sessions: this rank's connected backends, by name.
        slate: what the decision follows from.
        plugins: this rank's plugins, by name.
        member: this rank in the group.
        prepared: what `comm.pre_capture_init` has prepared the backends for.
        kept_nbytes: of the memory budget, what backends hold that were in use and serve nothing any more.
    """

    topology: Topology
    decision: Decision
    sessions: dict[str, Session]
    slate: Slate
    plugins: Mapping[str, Plugin]
    member: Membership
    prepared: tuple[Shapes, ...] = ()
    kept_nbytes: int = 0

    @classmethod
    def of(
        cls, slate: Slate, sessions: dict[str, Session], plugins: Mapping[str, Plugin], member: Membership
    ) -> NegotiatedGroup:
        """What follows from a slate and its sessions."""
        notes = {name: session.describe_failed_cells() for name, session in sessions.items() if session.failed_cells}
        decision = slate.decision(member.topology.device_types, notes)
        return cls(member.topology, decision, sessions, slate, plugins, member)
