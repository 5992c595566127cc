"""How a handle that stops tells the group's other ranks, and how they hear of it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from comm_core._control.deadline import raises_interrupts, run_with_deadline, text_of
from comm_core._control.stage import Stage, StageAbortedError

if TYPE_CHECKING:
    from comm_core._control.store import Control

__all__ = ["STOPPED", "describe_stopped", "find_stopped", "raises_interrupts", "tell_peers", "text_of"]

#: The consequence of a failure that `comm.recover` may mend, and the remedies, for texts.
STOPPED = (
    "This handle refuses further calls; call comm.recover(group) on all its ranks, or comm.close(group) and get a new "
    "one"
)
# The stage that the first rank whose handle stops aborts.
_FAILED = "failed"
# How long a rank that has failed waits for the store before it ends its peers' waits, in seconds: many times what a
# store takes on a busy machine.
_TELL_S = 2.0


def tell_peers(control: Control, why: str) -> StageAbortedError | None:
    """Say why this rank's handle stops. Local.

    Returns:
        The first reason that a rank gave; None if the store is slow or gone.
    """
    tell = functools.partial(Stage(control, _FAILED).abort, why)
    try:
        return run_with_deadline(tell, _TELL_S, name="telling the peers of a failure")
    except (RuntimeError, TimeoutError):  # no thread can be started; or the thread goes on, and tells them later
        return None


def find_stopped(control: Control) -> StageAbortedError | None:
    """Return the first reason for which a rank's handle has stopped; None if none has. Local."""
    return Stage(control, _FAILED).peek()


def describe_stopped(control: Control, stopped: StageAbortedError) -> str:
    """Describe the rank whose handle has stopped first, and its reason, for texts."""
    label = "another rank" if stopped.rank is None else control.label(stopped.rank)
    return f"the handle of {label} stopped: {stopped.reason}"
