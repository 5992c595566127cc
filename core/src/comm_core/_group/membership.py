"""This rank's membership in a negotiating group, and calls of plugins that may hang or fail."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import describe, run_with_deadline
from comm_core._control.own_group import OwnGroup
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._control.store import Control
from comm_core._plan import parse
from comm_core.context import GroupContext
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology

__all__ = ["Membership", "abort_stage", "check_budget", "run_in_worker"]

# The vote of a stage waits this much longer than the plugin's call, in seconds: a rank that ran out of time reports its
# own reason before the others time out on it.
_VOTE_GRACE_S = 10.0


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
        )
        return cls(context, topology, control, connect_timeout_s, compares_calls=settings.debug)

    def own_group(self, plugin_name: str) -> OwnGroup:
        """Return the own group of a plugin's session, which isn't made yet."""
        name = f"{self.stage_prefix}context.group of {plugin_name}"
        return OwnGroup(self.context.group, self.control, name, self.connect_timeout_s)

    @property
    def stage_timeout_s(self) -> float:
        """The deadline of one stage, its vote included, in seconds."""
        return self.connect_timeout_s + _VOTE_GRACE_S

    def read_memory(self, votes: Sequence[Any]) -> list[int]:
        """Read the ranks' votes on a `connect`: the memory of their sessions, in bytes.

        Raises:
            NegotiationError: a vote can't be read; on all ranks, and so for every method of this kind.
        """
        return parse.parse_each(votes, parse.read_memory, self.control.label)

    def read_failures(self, votes: Sequence[Any]) -> list[dict[str, str]]:
        """Read the ranks' votes on an admission test: reasons by the numbers of the failed kinds of message."""
        return parse.parse_each(votes, parse.read_failures, self.control.label)

    def read_recorded(self, values: Sequence[Any]) -> list[tuple[int, ...]]:
        """Read the numbers of the admission cases that each rank has recorded."""
        return parse.parse_each(values, parse.read_recorded, self.control.label)

    def read_shapes(self, values: Sequence[Any]) -> list[tuple[bool, list[Any]]]:
        """Read the ranks' arguments of `comm.pre_capture_init`, each with whether the rank is prepared for them."""
        return parse.parse_each(values, parse.read_shapes, self.control.label)

    def read_prepared(self, votes: Sequence[Any]) -> list[tuple[int, dict[str, Any] | None]]:
        """Read the ranks' votes on a `pre_capture_init`: memory in bytes, and the encoded new answer, if any."""
        return parse.parse_each(votes, parse.read_prepared, self.control.label)


def check_budget(memory_nbytes: int, budget: int) -> None:
    """Raise `MemoryError` if a session takes more device memory than its budget, in bytes."""
    if not 0 <= memory_nbytes <= budget:
        raise MemoryError(f"the session takes {memory_nbytes} bytes; {budget} of {PREFIX}MEMORY_BUDGET_NBYTES are left")


def run_in_worker(
    call: Callable[[], Any],
    member: Membership,
    name: str,
    *,
    synchronize: bool = True,
    on_late: Callable[[Any], object] | None = None,
) -> Any:
    """Call a function that may hang, under a deadline: in a thread with the group's device and the caller's stream.

    Args:
        call: the function.
        member: the source of the device and the deadline.
        name: the call's name in errors.
        synchronize: whether to wait for the work that `call` queued on the stream.
        on_late: receives a result that arrives after the deadline.

    Returns:
        The result of `call`.
    """
    device = member.context.device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> Any:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            value = call()
            if stream is not None and synchronize:
                stream.synchronize()
            return value

    return run_with_deadline(work, member.connect_timeout_s, name=name, on_late=on_late)


def _failure_reason(error: BaseException) -> str:
    """Describe a failure for the other ranks."""
    return str(error) if isinstance(error, TimeoutError) else describe(error)


def abort_stage(stage: Stage, member: Membership, error: Exception) -> StageAbortedError:
    """Abort a stage in which a plugin failed; if its hook timed out on other ranks, the reason names them."""
    awaited = stage.pending_ranks() if isinstance(error, TimeoutError) else ()
    waits = f": it waits for {member.control.label(*awaited)}" if awaited else ""
    return stage.abort(_failure_reason(error) + waits)
