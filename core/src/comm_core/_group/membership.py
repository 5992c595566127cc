"""This rank's membership in a negotiating group, and calls of plugins that may hang or fail."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import describe, is_timeout
from comm_core._control.own_group import OwnGroup
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._control.store import Control
from comm_core._control.worker import run_on_device
from comm_core._plan import parse
from comm_core.context import GroupContext
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = ["Membership", "Step", "check_budget", "run_in_worker"]

# A step waits this much longer for a rank than for its hooks, in seconds, so that a rank with a hook that ran out of
# time reports it first: far above the time of a report on a busy machine, but no more than half of the hooks' deadline,
# and at least the first number.
_GRACE_S = (1.0, 10.0)

# The longest failure that a rank reports, in characters.
_REASON_CHARS = 4000


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

    def read_prepared(self, votes: Sequence[Any]) -> list[tuple[int, dict[str, Any] | None]]:
        """Read the ranks' votes on a `pre_capture_init`: memory in bytes, and the encoded new answer, if any."""
        return parse.parse_each(votes, parse.read_prepared, self.control.label)


@dataclasses.dataclass
class Step:
    """A candidate's connect, admission or preparation on this rank.

    Its hooks have one deadline, and all exchanges of the step have one end, soon after. A rank that is alive reports by
    then whatever its hooks do. So a rank that doesn't come by then has vanished.

    Attributes:
        member: the group and this rank in it.
        failure: why the backend failed on this rank; None if it didn't, or if a time-out or another rank's abort
            came before: then the cause may lie elsewhere.
    """

    member: Membership
    failure: str | None = None
    _started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """The seconds that are left to the step's exchanges."""
        member = self.member
        left_s = self._started + member.connect_timeout_s + member.grace_s - time.monotonic()
        # A process that was stopped, and all exchanges are over: it still reads their outcome.
        return max(left_s, member.close_timeout_s)

    def run(
        self,
        call: Callable[[], Any],
        name: str,
        *,
        synchronize: bool = True,
        on_late: Callable[[Any], object] | None = None,
    ) -> Any:
        """Call one of the plugin's functions; all calls of the step share a deadline. See `run_in_worker`."""
        left_s = max(self._started + self.member.connect_timeout_s - time.monotonic(), 0.0)
        # Rounded for the error's text.
        return run_in_worker(
            call, self.member, name, timeout_s=round(left_s, 2), synchronize=synchronize, on_late=on_late
        )

    def abort(self, stage: Stage, error: Exception) -> StageAbortedError:
        """Abort a stage in which the plugin failed; if its hook timed out on other ranks, the reason names them."""
        reason = str(error) if isinstance(error, TimeoutError) else describe(error)
        late = is_timeout(error)
        if stage.aborted is None and not late and self.failure is None:
            self.failure = reason[:_REASON_CHARS]
        awaited = stage.pending_ranks() if isinstance(error, TimeoutError) else ()
        waits = f": it waits for {self.member.control.label(*awaited)}" if awaited else ""
        return stage.abort(reason + waits, is_timeout=late)


def check_budget(memory_nbytes: int, budget: int) -> None:
    """Raise `MemoryError` if a session takes more device memory than its budget, in bytes."""
    if not 0 <= memory_nbytes <= budget:
        raise MemoryError(f"the session takes {memory_nbytes} bytes; {budget} of {PREFIX}MEMORY_BUDGET_NBYTES are left")


def run_in_worker(
    call: Callable[[], Any],
    member: Membership,
    name: str,
    *,
    timeout_s: float | None = None,
    synchronize: bool = True,
    on_late: Callable[[Any], object] | None = None,
) -> Any:
    """Call a function that may hang, under a deadline: in a thread with the group's device and the caller's stream.

    Args:
        call: the function.
        member: the source of the device, and of the deadline unless `timeout_s` is one.
        name: the call's name in errors.
        timeout_s: the deadline, in seconds; None: that of `connect`.
        synchronize: whether to wait for the work that `call` queued on the stream.
        on_late: receives a result that arrives after the deadline.

    Returns:
        The result of `call`.
    """
    limit_s = member.connect_timeout_s if timeout_s is None else timeout_s
    return run_on_device(call, member.context.device, limit_s, name, synchronize=synchronize, on_late=on_late)
