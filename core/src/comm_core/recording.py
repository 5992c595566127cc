"""`comm.capture()`: the sessions of all groups are entered before graphs are captured and left together afterwards.

What a session registers (the addresses that a graph reads from) is exchanged when it is left. The ranks of its group
meet there, once the session begins to talk, in a stage of the control channel that a number names. A rank whose capture
failed posts an abort under its number and waits for nobody: its peers read it instead of waiting. A number is used up
by a meeting and by an abort, and not by a capture in which the session said nothing. So ranks that capture nothing, or
other things, hold up nobody.

An abort that a rank finds where it wanted to meet the others is of its own capture, or of an earlier one in which this
rank had nothing to say. That follows from how many captures both have entered since the number before was used up; the
abort brings the other's count along. The earlier one is passed over.
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
from comm_core.control import Control, Stage, StageAbortedError, StageTimeoutError
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
    _stage: Stage | None = None  # where the ranks have met
    _missed: StageAbortedError | None = None  # why they haven't

    def enter(self) -> None:
        """Enter the session. Local.

        Raises:
            CaptureError: the plugin raised.
        """
        self.session.entered += 1
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
        try:
            with self.session.channel.opened_by(self._meet):
                if context is not None:
                    context.__exit__(None, None, None)
                self._vote()
        except StageTimeoutError as error:
            raise CommTimeoutError(f"{self._lost}: {error}", error.ranks) from error
        except StageAbortedError as error:
            raise CaptureError(f"{self._lost}: {error}") from error
        except BaseException as error:  # the plugin border, as in `enter`; of an interrupt the peers are told
            told = self._abort(words(error))
            if not isinstance(error, Exception):
                raise
            raise CaptureError(f"{self._lost}: {told}") from error
        finally:
            if self._stage is not None:
                self._use_up(self.session.entered)

    def leave_by(self, error: BaseException) -> None:
        """Leave the session because of `error`, if it was entered, and tell its peers. Local, doesn't raise."""
        context, self._context = self._context, None
        if context is not None:
            try:
                context.__exit__(type(error), error, error.__traceback__)
            except Exception as raised:  # noqa: BLE001 - the plugin border; a `contextmanager` may raise `error` itself
                if raised is not error:
                    _log.warning("%s raised while a failed capture was left: %s", self._who, describe(raised))
        with contextlib.suppress(CommError):
            self._abort(describe(error))

    def _meet(self) -> Stage:
        """The stage in which this capture's ranks talk, once all of them are there."""
        while self._missed is None:
            stage = self._new_stage()
            try:
                stage.barrier()
            except StageAbortedError as error:
                if self._is_over(error):
                    continue
                self._missed = error
            else:
                self._stage = stage
                return stage
        raise self._missed

    def _vote(self) -> None:
        """Find out how the others ended."""
        if self._missed is not None:  # also where the plugin has swallowed it
            raise self._missed
        if self._stage is not None:
            self._stage.all_gather(None, "vote")

    def _abort(self, reason: str) -> StageAbortedError:
        """End this capture for the session's peers."""
        if self._stage is not None:
            return self._stage.abort(reason)
        while True:
            error = self._new_stage().abort(reason)
            if not self._is_over(error):
                return error

    def _is_over(self, error: StageAbortedError) -> bool:
        """Whether what was aborted under this number is an earlier capture than this one; the number is used up then.

        So it is by an abort of this very capture, but not by one of a capture that this rank has yet to enter.
        """
        earlier = error.note < self.session.entered
        if error.note <= self.session.entered:
            self._use_up(error.note)
        return earlier

    def _use_up(self, captures: int) -> None:
        self.session.captures += 1
        self.session.entered -= captures

    def _new_stage(self) -> Stage:
        session = self.session
        name = f"capture {session.plugin.name} {session.captures}"
        return Stage(self.control, name, note=session.entered)

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
    waiting = list(seats)
    try:
        while waiting:
            waiting.pop(0).enter()
        yield
        refuse_capture("comm.capture() can't be left", "End the capture within it: torch.cuda.graph is the inner block")
    except BaseException as error:
        for seat in waiting:  # their peers enter them
            seat.session.entered += 1
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
