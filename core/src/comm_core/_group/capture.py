"""`comm.capture()`: enter the sessions of all groups before graphs are captured, and leave them together afterwards.

When the ranks leave a session, they may exchange data about the captured calls, in a stage with a number in its name.
Each rank counts these numbers locally, for each session, and uses up one number

- at a clean exit with an exchange: core votes on the exchange;
- at an exit by an exception: this rank posts an abort under the number and waits for no other rank.

A clean exit without an exchange uses up no number. So each peer meets an abort once, in its current capture or in its
next one with an exchange, whichever rank was faster. A time-out is an abort by the ranks that arrived; an absent rank
missed that capture, and skips its number at its next entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from comm_core._control.deadline import WaitInterruptedError, describe, raises_interrupts
from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import Stage, StageTimeoutError
from comm_core._control.store import Control
from comm_core._control.worker import run_on_device
from comm_core._group.states import GroupState
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core.errors import CaptureError, CommTimeoutError

__all__ = [
    "OutermostCapture",
    "WaitInterruptedError",
    "capture_sessions",
    "join_or_open",
    "raises_interrupts",
    "refuse_in_capture",
]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass(eq=False)
class SessionCapture:
    """One session's part in a capture.

    Attributes:
        title: the group's title.
        serving: the group's bound plan.
        control: the group's control channel.
        session: the session to enter and leave.
    """

    title: str
    serving: Serving
    control: Control
    session: Session
    _context: AbstractContextManager[Any] | None = None

    def skip_missed(self) -> None:
        """Skip the number of each capture that ended without this rank, by its peers' time-out. Local."""
        while isinstance(Stage(self.control, self._stage_name).peek(), StageTimeoutError):
            self.session.advance_capture()

    def enter(self) -> None:
        """Enter the session, unless its handle has failed. Local.

        Raises:
            CaptureError: the plugin raised.
        """
        if self.serving.failure is not None:
            return  # this rank's calls raise; its peers' calls may go on
        try:
            # Half: the peers that wait at their exits hear of a hang in time.
            context = self._run(self._entered_context, 0.5, "enter", on_late=_exit_late)
        except Exception as error:  # plugin boundary: re-raised with the backend's name
            raise CaptureError(f"{self._label} can't enter the capture: {describe(error)}") from error
        self._context = context

    def leave(self) -> None:
        """Leave the session and vote on its exchanges with its peers. Collective if it has something to exchange.

        Raises:
            CaptureError: the exit failed, on any rank.
            CommTimeoutError: ranks didn't arrive in time.
        """
        if self._context is None:
            return
        if self.serving.failure is not None:
            failed = CaptureError(f"{self._label} failed during the capture: {self.serving.failure}")
            self.leave_with_error(failed)
            raise failed
        context, self._context = self._context, None
        try:
            with self.session.channel.open_stage(self.control, self._stage_name) as stage:
                # Twice: it may wait for its peers first, and then do as much.
                self._run(functools.partial(context.__exit__, None, None, None), 2.0, "exit")
                if stage.begun:  # raises an abort that the plugin has swallowed
                    stage.all_gather(None, "vote")
        except StageTimeoutError as error:
            raise CommTimeoutError(self._failure_text(error), error.ranks) from error
        except Exception as error:  # plugin boundary: all ranks raise the stage's abort
            raise CaptureError(self._failure_text(stage.aborted)) from error
        finally:
            if stage.begun or stage.aborted is not None:
                self.session.advance_capture()

    def leave_with_error(self, error: BaseException) -> None:
        """Leave the session with `error`, if it was entered, and abort its peers' capture. Local; never raises."""
        context, self._context = self._context, None
        if context is not None:
            try:
                leave = functools.partial(context.__exit__, type(error), error, error.__traceback__)
                self._run(leave, 0.5, "exit")
            except Exception as raised:  # noqa: BLE001 - plugin boundary; a `contextmanager` re-raises `error` itself
                if raised is not error:
                    _log.warning("%s raised on exit from a failed capture: %s", self._label, describe(raised))
        Stage(self.control, self._stage_name).abort(describe(error))
        self.session.advance_capture()

    def _entered_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.session.plugin.hooks["capture_ctx"](self.session.value)
        context.__enter__()
        return context

    def _run(
        self, call: Callable[[], Any], part: float, step: str, on_late: Callable[[Any], object] | None = None
    ) -> Any:
        """Call a part of the hook in a thread, under a deadline: a part of the control channel's."""
        timeout_s = round(part * self.control.timeout_s, 2)
        name = f"{step} of capture_ctx of {self.session.plugin.name}"
        return run_on_device(call, self.session.device, timeout_s, name, on_late=on_late)

    @property
    def _stage_name(self) -> str:
        return f"capture {self.session.plugin.name} {self.session.capture_number}"

    @property
    def _label(self) -> str:
        return f"backend {self.session.plugin.name!r} of {self.title}"

    def _failure_text(self, error: BaseException | None) -> str:
        return f"the capture of {self._label} failed: {error}. Its graphs must not be replayed. Capture again"


def _exit_late(context: AbstractContextManager[Any]) -> None:
    """Leave a session that was entered after the deadline."""
    error = CaptureError("the session was entered too late")
    with contextlib.suppress(CaptureError):
        context.__exit__(CaptureError, error, None)


@contextlib.contextmanager
def _entered(captures: Sequence[SessionCapture], suspended: Sequence[Serving]) -> Iterator[None]:
    """Enter the sessions in order and leave them in reverse; after the first error, leave the others with it.

    Raises:
        CaptureError: a group is suspended, or entering or leaving a session failed.
        CommTimeoutError: a session's peers didn't reach the end of the capture in time.
    """
    for capture in captures:
        capture.skip_missed()
    remaining = list(captures)
    try:
        raise_if_capturing("comm.capture() can't be entered", "Enter it first, and torch.cuda.graph within it")
        if suspended:
            raise CaptureError(f"comm.capture() can't be entered: {suspended[0].refusal}")
        for capture in captures:
            capture.enter()
        yield
        raise_if_capturing(
            "comm.capture() can't be left", "End the capture within it: torch.cuda.graph is the inner block"
        )
        while remaining:
            remaining.pop().leave()
    except BaseException as error:
        while remaining:
            remaining.pop().leave_with_error(error)
        raise


@contextlib.contextmanager
def capture_sessions(states: Sequence[GroupState], outermost: OutermostCapture) -> Iterator[None]:
    """Enter the sessions of all groups that have a handle; calls on a capturing stream take the graph routes."""
    servings = [state.serving for state in states if state.serving is not None]
    # The peers of a suspended group can't enter a capture either. Those of the other groups have to hear of an error.
    suspended = [serving for serving in servings if serving.suspended]
    captures = [capture for state in states if state.serving not in suspended for capture in _session_captures(state)]
    with _entered(captures, suspended):
        try:
            for serving in servings:
                serving.use_graph_routes(True)
            with outermost.opened():
                yield
        finally:
            for serving in servings:
                serving.use_graph_routes(False)


def _session_captures(state: GroupState) -> Iterator[SessionCapture]:
    """Yield a group's sessions that a capture enters, also if its handle failed on this rank: peers may go on."""
    serving, control, negotiated = state.serving, state.control, state.negotiated
    if serving is not None and control is not None and negotiated is not None:
        for session in negotiated.sessions.values():
            if session.plugin.has("capture_ctx"):
                yield SessionCapture(state.title, serving, control, session)


_changed = threading.Condition()
_outermost: OutermostCapture | None = None
_open_count = 0  # nested captures included


@dataclasses.dataclass(eq=False)
class OutermostCapture:
    """A `comm.capture()` that isn't nested in another.

    Attributes:
        thread: the identifier of the thread that entered it.
        phase: "entering" and "leaving" its sessions; in between, "open": nested captures may join it.
        nested_count: open nested captures.
    """

    thread: int
    phase: Literal["entering", "open", "leaving"] = "entering"
    nested_count: int = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Let nested captures join until the block's end.

        Raises:
            CaptureError: a nested capture is still open at the end.
        """
        with _changed:
            self.phase = "open"
            _changed.notify_all()
        try:
            yield
        finally:
            with _changed:
                self.phase = "leaving"
                nested_count = self.nested_count
        if nested_count:
            raise CaptureError(
                "comm.capture() can't be left while a nested comm.capture() is open in another thread: the addresses "
                "that it records would never be registered. Wait for that thread first"
            )


@contextlib.contextmanager
def join_or_open() -> Iterator[OutermostCapture | None]:
    """Join this process's outermost capture, of any thread, and yield None; if there is none, open one and yield it.

    Waits while another thread enters or leaves the outermost capture: a call recorded then would have no session.

    Raises:
        CaptureError: at the end, if the outermost capture ended before this nested one.
    """
    global _open_count, _outermost  # noqa: PLW0603 - one capture a process, like the groups
    thread = threading.get_ident()
    with _changed:
        _changed.wait_for(lambda: _outermost is None or _outermost.phase == "open" or _outermost.thread == thread)
        is_nested = _outermost is not None
        outermost = _outermost = _outermost or OutermostCapture(thread)
        outermost.nested_count += is_nested
        _open_count += 1
    try:
        yield None if is_nested else outermost
        if is_nested and outermost.phase == "leaving":
            raise CaptureError(
                "the outer comm.capture() ended before this nested one: graphs captured in this one must not be "
                "replayed. Capture again, and end the nested one first"
            )
    finally:
        with _changed:
            _open_count -= 1
            outermost.nested_count -= is_nested
            if not is_nested:
                _outermost = None
                _changed.notify_all()


def refuse_in_capture(function: str) -> None:
    """Refuse a call of `function` inside `comm.capture()` and while a stream captures.

    Raises:
        CaptureError: a `comm.capture()` is open, or the current stream captures.
    """
    if _open_count:
        raise CaptureError(f"{function} can't be called inside comm.capture(). Call it before the capture, or after")
    raise_if_capturing(f"{function} can't wait for other ranks", "Call it before the capture, or after")
