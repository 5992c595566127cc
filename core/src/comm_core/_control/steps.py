"""Keep the ranks of an admission test together: a rank whose step failed waits until no rank is in that step.

A backend may raise on one rank before its calls of a step. If that rank went on, its next calls would be paired with
the calls in which the other ranks still wait: Gloo ends the process if their sizes differ.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

from comm_core._control.stage import Stage
from comm_core._control.store import Control, Store
from comm_core.errors import CommError

__all__ = ["Steps"]

# How long a rank whose step failed waits until the others have ended that step, in seconds: they may be slower, or wait
# for this rank's message. At most half of the time that is left, so that its reason comes before the time-outs.
_PATIENCE_S = 30.0
# How often a rank that failed looks whether the others have ended the step, in seconds.
_POLL_S = 0.01


class Steps:
    """The steps of one stage, as many on every rank.

    Args:
        control: the group's control channel.
        name: equal on every rank, and used once per incarnation.
        stage: the stage that a rank aborts if the others don't end a step that failed on it.
        timeout_s: the deadline of all steps together, from now, in seconds.
    """

    def __init__(self, control: Control, name: str, stage: Stage, timeout_s: float) -> None:
        self._control = control
        self._name = name
        self._stage = stage
        self._deadline = time.monotonic() + timeout_s
        self._ended = 0
        self._finished = False
        self._lock = threading.Lock()  # guards both: a thread that outlives its deadline may still run steps

    def end(self, reason: str) -> None:
        """End a step. If it failed on this rank, wait until it has ended on every rank.

        Args:
            reason: why the step failed on this rank, "" if it succeeded.

        Raises:
            StageAbortedError: the step failed here and a rank is still in it, so this rank aborts the stage with
                `reason`; or another rank has aborted it.
            CommError: the store is gone, or the test has ended without this thread.
        """
        with self._lock:
            if self._finished:
                raise CommError(f"{self._name}: the test ended before this step did")
            self._ended += 1
            number = self._ended
        arrived = self._call(functools.partial(self._arrive, number))
        if not reason:
            return
        now = time.monotonic()
        deadline = now + min(_PATIENCE_S, (self._deadline - now) / 2)
        while arrived < self._control.world_size:
            if not self._stage.begun and (aborted := self._stage.peek()) is not None:
                raise aborted
            if time.monotonic() > deadline:
                raise self._stage.abort(reason)
            time.sleep(_POLL_S)
            arrived = self._call(lambda store: store.add(f"{self._key(number)}/arrived", 0))

    def finish(self) -> None:
        """Refuse further steps; note the last key, to be deleted once every rank has left the group's incarnation."""
        with self._lock:
            self._finished = True
        if self._ended:
            self._control.note_abort(self._key(self._ended))

    def _call(self, operation: Callable[[Store], int]) -> int:
        return self._control.call_store(self._name, operation)

    def _arrive(self, number: int, store: Store) -> int:
        arrived = int(store.add(f"{self._key(number)}/arrived", 1))
        if arrived == self._control.world_size and number > 1:
            # Every rank is here, so no rank waits for the end of the step before.
            store.delete_key(f"{self._key(number - 1)}/arrived")
        return arrived

    def _key(self, number: int) -> str:
        return f"{self._control.prefix}/{self._name}/step {number}"
