"""`context.control`: the exchanges of a plugin's Collective hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import Stage
from comm_core._control.store import Control
from comm_core.context import Agreement
from comm_core.errors import CommError

__all__ = ["SessionChannel"]


class SessionChannel:
    """The `context.control` of a plugin: passes calls to the stage of the running Collective hook, else raises.

    A thread that outlives its deadline keeps its own, aborted stage: it never reaches a later one.
    """

    def __init__(self) -> None:
        self._stage: Stage | None = None

    @contextlib.contextmanager
    def open_stage(self, control: Control, name: str, timeout_s: float | None = None) -> Iterator[Stage]:
        """Open a stage for the plugin's exchanges; see `Stage`."""
        with Stage(control, name, timeout_s) as stage:
            self._stage = stage
            yield stage
        # Only after success: a thread that outlives its deadline keeps the aborted stage, in which every call raises.
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
        raise_if_capturing(
            "no rank can wait for the others", "Exchange in connect, pre_capture_init or capture_ctx's exit"
        )
        if self._stage is None:
            raise CommError("context.control works only inside Collective hooks (see docs/hooks.md)")
        return self._stage
