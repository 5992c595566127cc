"""This rank's membership in a negotiating group, and calls of plugins that may hang or fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comm_core._control.channel import SessionChannel
from comm_core._control.own_group import OwnGroup
from comm_core._control.store import Control
from comm_core._plan import parse
from comm_core._plan.faults import Fault, read_fault
from comm_core.context import GroupContext
from comm_core.env import Settings
from comm_core.topology import Topology

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = ["Membership"]

# A step waits this much longer for a rank than for its hooks, in seconds, so that a rank with a hook that ran out of
# time reports it first: far above the time of a report on a busy machine, but no more than half of the hooks' deadline,
# and at least the first number.
_GRACE_S = (1.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Membership:
    """This rank's membership in a negotiating group.

    Attributes:
        context: the plugins' context, with the user's group; each plugin gets its own `group`, `control` and
            `memory_budget_nbytes`.
        topology: the group's topology.
        control: the group's control channel.
        connect_timeout_s: the deadline of each candidate's `connect`, and of each admission test, in seconds.
        stage_prefix: the prefix of the stages' names; a different one each time that the group plans.
        compares_calls: whether the handle compares each call between the ranks.
    """

    context: GroupContext
    topology: Topology
    control: Control
    connect_timeout_s: float
    stage_prefix: str = ""
    compares_calls: bool = False

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup,
        topology: Topology,
        control: Control,
        device: torch.device,
        settings: Settings,
        connect_timeout_s: float,
        wire: str = "",
    ) -> Membership:
        """Create the membership of this rank in `group`."""
        context = GroupContext(
            group=group,
            rank=control.rank,
            world_size=control.world_size,
            device=device,
            global_ranks=control.global_ranks,
            control=SessionChannel(),
            memory_budget_nbytes=settings.memory_budget_nbytes,
            wait_timeout_s=settings.wait_timeout_s,
            wire=wire,
        )
        return cls(context, topology, control, connect_timeout_s, compares_calls=settings.debug)

    def own_group(self, plugin_name: str) -> OwnGroup:
        """Return the own group of a plugin's session, which isn't made yet."""
        name = f"{self.stage_prefix}context.group of {plugin_name}"
        return OwnGroup(self.context.group, self.control, name, self.connect_timeout_s)

    @property
    def grace_s(self) -> float:
        """How much longer a step lasts than the deadline of its hooks, in seconds."""
        shortest_s, longest_s = _GRACE_S
        return min(longest_s, max(shortest_s, self.connect_timeout_s / 2))

    @property
    def close_timeout_s(self) -> float:
        """The deadline for closing sessions while the other ranks wait in a step, in seconds."""
        return self.grace_s / 2

    def read_memory(self, votes: Sequence[Any]) -> list[int]:
        """Read the ranks' votes on a `connect`: the memory of their sessions, in bytes.

        Raises:
            NegotiationError: a vote can't be read; on all ranks, and so for every method of this kind.
        """
        return parse.parse_each(votes, parse.read_memory, self.control.label)

    def read_failures(self, votes: Sequence[Any]) -> list[dict[str, tuple[bool, str]]]:
        """Read the ranks' votes on an admission test: by the numbers of the failed kinds of message, the reasons.

        Each comes with whether a time-out came before it.
        """
        return parse.parse_each(votes, parse.read_failures, self.control.label)

    def read_recorded(self, values: Sequence[Any]) -> list[tuple[int, ...]]:
        """Read the numbers of the admission cases that each rank has recorded."""
        return parse.parse_each(values, parse.read_recorded, self.control.label)

    def read_shapes(self, values: Sequence[Any]) -> list[tuple[bool, list[Any]]]:
        """Read the ranks' arguments of `comm.pre_capture_init`, each with whether the rank is prepared for them."""
        return parse.parse_each(values, parse.read_shapes, self.control.label)

    def read_faults(self, values: Sequence[Any]) -> list[Fault | None]:
        """Read the ranks' reports of the failures that stopped their handles; None for a sound one."""
        return parse.parse_each(values, read_fault, self.control.label)

    def read_prepared(self, votes: Sequence[Any]) -> list[tuple[int, dict[str, Any] | None]]:
        """Read the ranks' votes on a `pre_capture_init`: memory in bytes, and the encoded new answer, if any."""
        return parse.parse_each(votes, parse.read_prepared, self.control.label)
