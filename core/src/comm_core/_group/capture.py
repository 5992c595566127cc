"""`comm.capture()`: the sessions of all groups are entered before graphs are captured and left together afterwards.

When a session is left, its ranks may exchange data about the captured calls. They do so in a stage of the control
channel that has a number in its name. Each rank counts the numbers of a session by itself, and uses one up in

- a clean exit in which the session talked: core votes on it;
- an exit by an exception: it posts an abort under the number and waits for no other rank.

A capture in which the session said nothing uses up none. So an abort meets each peer once, in the capture that it is in
or in its next one that has something to exchange, whichever rank was faster. A time-out is an abort by the ranks that
came; the others have missed that capture, and skip its number when they enter their next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from comm_core._control.deadline import describe
from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import Stage, StageTimeoutError
from comm_core._control.store import Control
from comm_core._group.handles import GroupState
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core.errors import CaptureError, CommTimeoutError

__all__ = ["Outermost", "captured", "joined", "refuse_in_capture"]

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

    def skip_missed(self) -> None:
        """Skip the numbers of captures whose end this rank has missed: its peers waited until their deadline. Local."""
        while isinstance(Stage(self.control, self._stage_name).peek(), StageTimeoutError):
            self.session.use_up_capture()

    def enter(self) -> None:
        """Enter the session. Local.

        Raises:
            CaptureError: the plugin raised.
        """
        if self.serving.failure is not None:
            return  # its calls raise; those of its peers may go on
        try:
            context = self.session.plugin.hooks["capture_ctx"](self.session.value)
            context.__enter__()
        except Exception as error:  # plugin boundary: re-raised with the backend's name
            raise CaptureError(f"{self._who} can't be captured: {describe(error)}") from error
        self._context = context

    def leave(self) -> None:
        """Leave the session and vote on its exchanges with its peers. Collective if it has something to exchange.

        Raises:
            CaptureError: it failed, on any rank.
            CommTimeoutError: ranks didn't come.
        """
        if self._context is None:
            return
        if self.serving.failure is not None:
            lost = CaptureError(f"{self._who} was lost during the capture: {self.serving.failure}")
            self.leave_by(lost)
            raise lost
        context, self._context = self._context, None
        failed = f"the capture of {self._who} failed, its graphs must not be replayed. Capture anew"
        try:
            with self.session.channel.open_stage(self.control, self._stage_name) as stage:
                context.__exit__(None, None, None)
                if stage.begun:  # also if the plugin has swallowed an abort: then this raises it
                    stage.all_gather(None, "vote")
        except StageTimeoutError as error:
            raise CommTimeoutError(f"{failed}: {error}", error.ranks) from error
        except Exception as error:  # plugin boundary: all ranks raise what the stage was aborted by
            raise CaptureError(f"{failed}: {stage.aborted}") from error
        finally:
            if stage.begun or stage.aborted is not None:
                self.session.use_up_capture()

    def leave_by(self, error: BaseException) -> None:
        """Leave the session by `error`, if it was entered, and abort its peers' capture. Local; never raises."""
        context, self._context = self._context, None
        if context is not None:
            try:
                context.__exit__(type(error), error, error.__traceback__)
            except Exception as raised:  # noqa: BLE001 - plugin boundary; a `contextmanager` may raise `error` itself
                if raised is not error:
                    _log.warning("%s raised while a failed capture was left: %s", self._who, describe(raised))
        Stage(self.control, self._stage_name).abort(describe(error))
        self.session.use_up_capture()

    @property
    def _stage_name(self) -> str:
        return f"capture {self.session.plugin.name} {self.session.captures}"

    @property
    def _who(self) -> str:
        return f"backend {self.session.plugin.name!r} of {self.title}"


@contextlib.contextmanager
def entered(seats: Sequence[Seat]) -> Iterator[None]:
    """Enter every seat; leave them in reverse: all by exception once one thing failed.

    Raises:
        CaptureError: entering or leaving failed; after it the others are left by exception.
        CommTimeoutError: a session's peers didn't come to its end.
    """
    for seat in seats:
        seat.skip_missed()
    waiting = list(seats)
    try:
        raise_if_capturing("comm.capture() can't be entered", "Enter it first, and torch.cuda.graph within it")
        for seat in seats:
            seat.enter()
        yield
        raise_if_capturing(
            "comm.capture() can't be left", "End the capture within it: torch.cuda.graph is the inner block"
        )
        while waiting:
            waiting.pop().leave()
    except BaseException as error:
        while waiting:
            waiting.pop().leave_by(error)
        raise


@contextlib.contextmanager
def captured(states: Sequence[GroupState], outermost: Outermost) -> Iterator[None]:
    """Enter the sessions of all groups that have a handle; inside, calls on a capturing stream take graphs' routes."""
    with entered([seat for state in states for seat in _seats(state)]):
        serving = [state.serving for state in states if state.serving is not None]
        try:
            for each in serving:
                each.use_graph_routes(True)
            with outermost.opened():
                yield
        finally:
            for each in serving:
                each.use_graph_routes(False)


def _seats(state: GroupState) -> Iterator[Seat]:
    """The sessions of a group that a capture enters, also those that this rank has lost: its peers may not have."""
    serving, control, agreed = state.serving, state.control, state.agreed
    if serving is not None and control is not None and agreed is not None:
        for session in agreed.sessions.values():
            if session.plugin.has("capture_ctx"):
                yield Seat(state.title, serving, control, session)


_changed = threading.Condition()
_outermost: Outermost | None = None
_open = 0  # captures, nested ones too


@dataclasses.dataclass(eq=False)
class Outermost:
    """A `comm.capture()` that is part of no other.

    Attributes:
        thread: the one that entered it.
        phase: "entering" or "leaving" its sessions, or in between "open": others may join it.
        inner: how many that have joined are open.
    """

    thread: int
    phase: Literal["entering", "open", "leaving"] = "entering"
    inner: int = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Let others join until the block's end.

        Raises:
            CaptureError: one of them is still open then.
        """
        with _changed:
            self.phase = "open"
            _changed.notify_all()
        try:
            yield
        finally:
            with _changed:
                self.phase = "leaving"
                inner = self.inner
        if inner:
            raise CaptureError(
                "comm.capture() can't be left while one inside it is open in another thread: what that records would "
                "never be registered. Wait for the thread before"
            )


@contextlib.contextmanager
def joined() -> Iterator[Outermost | None]:
    """Become this process's outermost capture, which is yielded, or join the one that there is, in any thread: None.

    Waits while another thread's is being entered or left: a call that is recorded then would have no session.

    Raises:
        CaptureError: at the end, if the joined one has ended before.
    """
    global _open, _outermost  # noqa: PLW0603 - of the process, like the groups
    me = threading.get_ident()
    with _changed:
        _changed.wait_for(lambda: _outermost is None or _outermost.phase == "open" or _outermost.thread == me)
        joins = _outermost is not None
        whole = _outermost = _outermost or Outermost(me)
        whole.inner += joins
        _open += 1
    try:
        yield None if joins else whole
        if joins and whole.phase == "leaving":
            raise CaptureError(
                "the comm.capture() that this one was a part of has ended before it: graphs captured in this one must "
                "not be replayed. Capture anew"
            )
    finally:
        with _changed:
            _open -= 1
            whole.inner -= joins
            if not joins:
                _outermost = None
                _changed.notify_all()


def refuse_in_capture(what: str) -> None:
    """Raise `CaptureError` inside `comm.capture()`, or while a stream captures."""
    if _open:
        raise CaptureError(f"{what} can't be called inside comm.capture(). Call it before, or after")
    raise_if_capturing(f"{what} can't wait for other ranks", "Call it before the capture, or after")
