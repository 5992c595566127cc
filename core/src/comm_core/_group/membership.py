"""This rank's place in a group that negotiates, and how it takes a step that may hang or fail."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import describe, run_with_deadline
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._control.store import Control
from comm_core.context import GroupContext
from comm_core.env import Settings
from comm_core.topology import Topology

__all__ = ["Membership", "abort_stage", "check_budget", "in_worker"]

# How much longer than a step's own deadline its vote waits, in seconds: whoever ran out of time says so himself, and
# the others hear his words rather than conclude that he is gone.
_VOTE_GRACE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Membership:
    """This rank's place in a group that negotiates.

    Attributes:
        context: what plugins are given, but for `control` and `memory_budget_nbytes`.
        topology: the group.
        control: the group's control channel.
        connect_timeout_s: for each candidate's `connect`, and again for its admission test, in seconds.
        purpose: what the names of its steps begin with; another each time that the group plans.
    """

    context: GroupContext
    topology: Topology
    control: Control
    connect_timeout_s: float
    purpose: str = ""

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
        """This rank in `group`, which `control` connects and `topology` describes."""
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
        return cls(context, topology, control, connect_timeout_s)

    @property
    def step_timeout_s(self) -> float:
        """For one step and its vote, in seconds."""
        return self.connect_timeout_s + _VOTE_GRACE_S


def check_budget(memory_nbytes: int, budget: int) -> None:
    """Raise where a session took more device memory than it may, in bytes."""
    if not 0 <= memory_nbytes <= budget:
        raise MemoryError(f"it took {memory_nbytes} bytes of a budget of {budget}")


def in_worker(
    call: Callable[[], Any],
    member: Membership,
    name: str,
    *,
    synchronize: bool = True,
    on_late: Callable[[Any], object] | None = None,
) -> Any:
    """Call a function that may hang in a thread with the group's device and the caller's stream, under a deadline.

    Args:
        call: its result is returned.
        member: gives the device and the deadline.
        name: names the call in errors.
        synchronize: whether to wait until the stream has finished what `call` queued.
        on_late: is given the result if that comes after the deadline.
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
    """Why a step failed, for the other ranks."""
    return str(error) if isinstance(error, TimeoutError) else describe(error)


def abort_stage(stage: Stage, member: Membership, error: Exception) -> StageAbortedError:
    """Abort a step in which a plugin failed; a hook that is late since it waits for other ranks says for which."""
    awaited = stage.pending_ranks() if isinstance(error, TimeoutError) else ()
    waits = f": it waits for {member.control.label(*awaited)}" if awaited else ""
    return stage.abort(_failure_reason(error) + waits)
