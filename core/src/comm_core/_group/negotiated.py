"""The outcome of a group's negotiation, and the starting point of `comm.pre_capture_init`."""

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
    """The outcome of a group's negotiation.

    Attributes:
        decision: the candidates and routes, equal on every rank.
        sessions: this rank's connected backends, by name.
        slate: the candidates' offers and verdicts, from which `decision` follows.
        asked_slate: the slate as `is_available` gave it, before anything was connected or prepared.
        plugins: this rank's plugins, by name.
        member: this rank's membership in the group.
        prepared: the shapes for which `comm.pre_capture_init` has prepared the backends.
        kept_nbytes: the part of the memory budget that dropped sessions hold, because they were in use.
    """

    decision: Decision
    sessions: dict[str, Session]
    slate: Slate
    asked_slate: Slate
    plugins: Mapping[str, Plugin]
    member: Membership
    prepared: tuple[Shapes, ...] = ()
    kept_nbytes: int = 0

    @property
    def topology(self) -> Topology:
        """The group's topology."""
        return self.member.topology

    @classmethod
    def of(
        cls,
        slate: Slate,
        asked_slate: Slate,
        sessions: dict[str, Session],
        plugins: Mapping[str, Plugin],
        member: Membership,
    ) -> NegotiatedGroup:
        """Create the outcome that follows from a slate and its sessions."""
        notes = {name: session.describe_failed_cells() for name, session in sessions.items() if session.failed_cells}
        decision = slate.decision(member.topology.device_types, notes)
        return cls(decision, sessions, slate, asked_slate, plugins, member)
