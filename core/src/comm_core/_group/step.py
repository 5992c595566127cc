"""A candidate's step: its hooks and exchanges, with one deadline and one end for all ranks."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from comm_core._control.deadline import causes, describe, is_timeout, text_of
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError
from comm_core._control.worker import run_on_device
from comm_core._group.membership import Membership
from comm_core._schema import printable
from comm_core.env import PREFIX

__all__ = ["Step", "check_budget", "run_in_worker"]

_log = logging.getLogger("comm_core")
# The most lines of a failure that are logged.
_LOGGED_LINES = 100
# The longest failure that a rank reports, in characters.
_REASON_CHARS = 4000


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
        reason = text_of(error) if isinstance(error, TimeoutError) else describe(error)
        late = is_timeout(error)
        # Another rank's abort, such as that of `context.group`, which the hook waited for.
        learnt = any(isinstance(cause, StageAbortedError) for cause in causes(error))
        if stage.aborted is None and not (late or learnt) and self.failure is None:
            self.failure = reason[:_REASON_CHARS]
        lines = text_of(error).strip().splitlines()
        if len(lines) > 1:  # as of a compiler; the reason that the ranks share is one line
            for line in lines[:_LOGGED_LINES]:  # each with the prefix, so that none can pass for another program's
                _log.warning("comm_core: %s: %s", type(error).__name__, printable(line)[:_REASON_CHARS])
        awaited = stage.pending_ranks() if isinstance(error, TimeoutError) else ()
        waits = f": it waits for {self.member.control.label(*awaited)}" if awaited else ""
        return stage.abort(reason + waits, is_timeout=late)

    def find_cause(self, error: StageAbortedError, stage_name: str) -> tuple[str, int | None]:
        """Return why the backend failed, and on which rank, once the step's stage is aborted. Collective.

        The reason is a failure of a rank rather than another rank's time-out, which may be its consequence. Returns
        once every rank has left the step: a wait inside the plugin may keep a rank there until its deadline.

        Args:
            error: the abort of the step's stage.
            stage_name: the name of a stage for this, equal on every rank and used once per incarnation.

        Raises:
            StageAbortedError: a rank left or vanished, and no rank can go on.
        """
        if error.final or (isinstance(error, StageTimeoutError) and error.ranks):
            raise error
        with Stage(self.member.control, stage_name, self.left_s) as stage:
            failures = stage.all_gather(self.failure)
        if error.is_timeout:
            for rank, failure in enumerate(failures):
                if isinstance(failure, str):
                    return failure, rank
        return error.reason, error.rank


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
