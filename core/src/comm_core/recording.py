"""`comm.capture()`: the sessions of all groups are entered before graphs are captured and left together afterwards.

What a session registers (the addresses that a graph reads from) is exchanged when it is left. The ranks of its group
meet there, once the session begins to talk, in a stage of the control channel that a number names. A rank whose capture
failed posts an abort under its number and waits for nobody: its peers read it instead of waiting. A number is used up
by a meeting and by an abort, and not by a capture in which the session said nothing. So ranks that capture nothing, or
other things, hold up nobody.

An abort that a rank finds where it wanted to meet the others is of its own capture where the session that failed had
recorded calls. One that hadn't may have failed before it could, or in a capture of something else, in which this rank
had nothing to say either. That follows from how many captures both have entered since the number before was used up;
the abort brings the other's count along, and the earlier one is passed over. So is one that is there because this very
rank didn't come in time: the others have raised by then.
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
from comm_core.control import Control, Stage, StageAbortedError, StageTimeoutError
from comm_core.errors import CaptureError, CommError, CommTimeoutError
from comm_core.establish import words
from comm_core.serving import Serving
from comm_core.session import Session

__all__ = ["Seat", "recording"]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class Seat:
    """One session's part in a capture.

    Attributes:
        title: names the group.
        serving: the group's.
        control: the group's control channel.
        session: to be entered.
    """

    title: str
    serving: Serving
    control: Control
    session: Session
    _context: AbstractContextManager[Any] | None = None
    _meeting: bool = False  # whether the plugin has begun to talk
    _stage: Stage | None = None  # where the ranks meet
    _missed: StageAbortedError | None = None  # why they don't

    def enter(self) -> None:
        """Enter the session. Local.

        Raises:
            CaptureError: the plugin raised.
        """
        self.session.entered += 1
        if self.serving.failure is not None:
            return  # its calls raise; those of its peers may go on
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
        if self._context is None:
            return
        if self.serving.failure is not None:
            error = CaptureError(f"{self._who} was lost during the capture: {self.serving.failure}")
            self.leave_by(error)
            raise error
        context, self._context = self._context, None
        try:
            with self.session.channel.opened_by(self._meet):
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
                self.session.captures, self.session.entered = self.session.captures + 1, 0

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
        self._meeting = True
        while self._missed is None:
            self._stage = self._new_stage()
            try:
                self._stage.barrier()
            except StageAbortedError as error:
                # An exchange that this rank has entered is never entered again.
                self._stage, self._missed = None, None if self._passes_over(error) else error
            else:
                return self._stage
        raise self._missed

    def _vote(self) -> None:
        """Find out how the others ended."""
        if self._missed is not None:  # also where the plugin has swallowed it
            raise self._missed
        if self._stage is not None:
            self._stage.all_gather(None, "vote")

    def _abort(self, reason: str) -> StageAbortedError:
        """End this capture for the session's peers."""
        if self._missed is not None:  # the peers know
            return self._missed
        if self._stage is not None:
            return self._stage.abort(reason)
        while True:
            error = self._new_stage().abort(reason)
            if error.note > self.session.entered or not self._passes_over(error):
                # Of the former, a capture that this rank has yet to enter, it hears there.
                return error

    def _passes_over(self, error: StageAbortedError) -> bool:
        """Use up a number that was aborted: whether that was of an earlier capture than this one."""
        session = self.session
        session.captures += 1
        if isinstance(error, StageTimeoutError) and self.control.rank in error.ranks:
            session.entered *= self._meeting
            return self._meeting
        earlier = 0 < error.note < session.entered
        session.entered = max(session.entered - error.note, 0) if error.note else 0
        return earlier

    def _new_stage(self) -> Stage:
        session = self.session
        name = f"capture {session.plugin.name} {session.captures}"
        return Stage(self.control, name, note=0 if self._meeting or self.serving.captured else session.entered)

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
    for seat in seats:
        seat.serving.captured = False
    try:
        refuse_capture("comm.capture() can't be entered", "Enter it first, and torch.cuda.graph within it")
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
    _leave_all(list(seats))


def _leave_all(seats: list[Seat]) -> None:
    """Leave every seat, the last one first; once one failed, the others because of that."""
    try:
        while seats:
            seats.pop().leave()
    except BaseException as error:
        while seats:
            seats.pop().leave_by(error)
        raise
