"""`comm.capture()`: the sessions of all groups are entered before graphs are captured and left together afterwards.

What a session registers (the addresses that a graph reads from) is exchanged when it is left. The ranks of its group
meet there in a stage of the control channel that the capture's number names. A rank whose capture failed posts an abort
under that number and waits for nobody: its peers read it instead of waiting. A number is used up by an end at which the
session talked, and by an abort; a rank that had nothing to say when the others' capture failed finds, when it enters
the next one, that the number is gone. So ranks that capture nothing, or other things, hold up nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from comm_core._capturing import refuse_capture
from comm_core._deadline import describe
from comm_core.backend import Backend
from comm_core.control import Control, StageAbortedError, StageTimeoutError
from comm_core.errors import CaptureError, CommError, CommTimeoutError
from comm_core.establish import Session, words

__all__ = ["Seat", "recording"]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class Seat:
    """One session's part in a capture.

    Attributes:
        title: names the group.
        handle: the group's.
        control: the group's control channel.
        session: to be entered.
    """

    title: str
    handle: Backend
    control: Control
    session: Session
    _context: AbstractContextManager[Any] | None = None

    def enter(self) -> None:
        """Enter the session. Local: reads which numbers are gone, and waits for nobody.

        Raises:
            CaptureError: the plugin raised.
            CommError: the job's store is gone.
        """
        self._skip()
        try:
            context = self.session.plugin.hooks["capture_ctx"](self.session.value)
            context.__enter__()
        except Exception as error:  # the plugin border: it is told by name
            raise CaptureError(f"{self._who} can't be captured: {describe(error)}") from error
        self._context = context

    def leave(self) -> None:
        """Leave the session, and meet its peers where it has something to exchange. Collective then.

        Raises:
            CaptureError: it failed, on any rank.
            CommTimeoutError: ranks didn't come.
        """
        if self.handle.failure is not None:
            error = CaptureError(f"{self._who} was lost during the capture: {self.handle.failure}")
            self.leave_by(error)
            raise error
        context, self._context = self._context, None
        spent = True
        try:
            with self.session.channel.opened(self.control, self._step) as stage:
                try:
                    if context is not None:
                        context.__exit__(None, None, None)
                except StageAbortedError:
                    raise
                except Exception as error:  # the plugin border, as in `enter`
                    raise stage.abort(words(error)) from error
                if stage.used:
                    stage.all_gather(None, "vote")
                spent = stage.used
        except StageTimeoutError as error:
            raise CommTimeoutError(f"{self._lost}: {error}", error.ranks) from error
        except StageAbortedError as error:
            raise CaptureError(f"{self._lost}: {error}") from error
        finally:
            self.session.captures += spent

    def leave_by(self, error: BaseException) -> None:
        """Leave the session because of `error`, if it was entered, and tell its peers. Local, doesn't raise."""
        context, self._context = self._context, None
        if context is None:
            with contextlib.suppress(CommError):
                self._skip()
        else:
            try:
                context.__exit__(type(error), error, error.__traceback__)
            except Exception as raised:  # noqa: BLE001 - the plugin border; a `contextmanager` may raise `error` itself
                if raised is not error:
                    _log.warning("%s raised while a failed capture was left: %s", self._who, describe(raised))
        with contextlib.suppress(CommError), self.control.stage(self._step) as stage:
            stage.abort(describe(error))
        self.session.captures += 1

    def _skip(self) -> None:
        """Pass over the numbers under which a peer's capture failed."""
        while self.control.was_aborted(self._step):
            self.session.captures += 1

    @property
    def _step(self) -> str:
        return f"capture {self.session.plugin.name} {self.session.captures}"

    @property
    def _who(self) -> str:
        return f"backend {self.session.plugin.name!r} of {self.title}"

    @property
    def _lost(self) -> str:
        return f"the capture of {self._who} failed, its graphs must not be replayed. Capture anew"


@contextlib.contextmanager
def recording(seats: Sequence[Seat]) -> Iterator[None]:
    """Enter every seat; leave them in reverse: all by exception once one thing failed.

    Raises:
        CaptureError: entering or leaving failed; after it the others are left by exception.
        CommTimeoutError: a session's peers didn't come to its end.
    """
    try:
        for seat in seats:
            seat.enter()
        yield
        refuse_capture("comm.capture() can't be left", "End the capture within it: torch.cuda.graph is the inner block")
    except BaseException as error:
        for seat in reversed(seats):
            seat.leave_by(error)
        raise
    failure: BaseException | None = None
    for seat in reversed(seats):
        if failure is not None:
            seat.leave_by(failure)
            continue
        try:
            seat.leave()
        except BaseException as error:  # noqa: BLE001 - the others are left before it is raised
            failure = error
    if failure is not None:
        raise failure
