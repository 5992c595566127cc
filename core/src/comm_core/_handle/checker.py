"""`Backend.check`: call the sessions' hook `check` under a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comm_core._control.worker import StandingWorker
from comm_core._handle.session import Session

if TYPE_CHECKING:
    import torch

__all__ = ["Checker"]


class Checker:
    """Calls the hook `check` of a group's sessions, in one thread that starts with the first call.

    An engine checks after every decode step, so a new thread for each call would be too dear. The thread ends with this
    object. The call's own cost is some 20 us.

    Args:
        device: the group's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._worker = StandingWorker(device)

    def find_failure(self, sessions: Sequence[Session]) -> tuple[str, Exception] | None:
        """Check sessions in order, until one fails.

        Args:
            sessions: the sessions; suspended ones, and those without the hook `check`, are skipped.

        Returns:
            The backend's name and the error: the hook's own; a `TimeoutError` if the hook hasn't returned within the
            session's `timeout_s`, or still hasn't since an earlier call; a `RuntimeError` if it raised `SystemExit`.
            None if all sessions are sound.

        Raises:
            KeyboardInterrupt: it came meanwhile, or a hook raised it.
        """
        checked = [session for session in sessions if session.plugin.has("check") and not session.suspended]
        if not checked:
            return None
        current = checked[0]

        def check() -> None:
            nonlocal current
            for current in checked:
                current.plugin.hooks["check"](current.value)

        try:
            self._worker.run(check, min(session.timeout_s for session in checked), "check")
        except Exception as error:  # noqa: BLE001 - plugin boundary: the caller raises it, with the backend's name
            return current.plugin.name, error
        return None
