"""How a plugin's Collective hooks talk to the other ranks: `context.control`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from comm_core._control.guard import refuse_capture
from comm_core._control.stage import Stage
from comm_core._control.store import Control
from comm_core.context import Agreement
from comm_core.errors import CommError

__all__ = ["SessionChannel"]


class SessionChannel:
    """What a plugin holds as `context.control`: the stage that its Collective hook runs in, and none outside.

    A thread that a deadline left behind keeps its own, aborted stage: it never reaches a later one.
    """

    def __init__(self) -> None:
        self._stage: Stage | None = None

    @contextlib.contextmanager
    def opened(self, control: Control, name: str, timeout_s: float | None = None) -> Iterator[Stage]:
        """Open a stage in which the plugin may talk; see `Stage`."""
        with Stage(control, name, timeout_s) as stage:
            self._stage = stage
            yield stage
        # Only after a good end: a thread that was left behind keeps the aborted stage, where every call raises.
        if stage.aborted is None:
            self._stage = None

    def all_gather(self, value: Any) -> list[Any]:
        """See `ControlChannel.all_gather`."""
        return self._open().all_gather(value)

    def barrier(self) -> None:
        """See `ControlChannel.barrier`."""
        self._open().barrier()

    def agree(self, ok: bool, reason: str = "") -> Agreement:
        """See `ControlChannel.agree`."""
        return self._open().agree(ok, reason)

    def _open(self) -> Stage:
        refuse_capture("no rank can wait for the others", "Talk in connect, pre_capture_init or capture_ctx's exit")
        if self._stage is None:
            raise CommError("context.control is open inside Collective hooks alone (see docs/hooks.md)")
        return self._stage
