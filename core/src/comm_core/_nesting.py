"""Which `comm.capture()` is the outermost of this process, and which are part of it, whatever thread they are in."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

from comm_core.errors import CaptureError

__all__ = ["Outermost", "any_open", "nested"]

_changed = threading.Condition()
_current: Outermost | None = None
_open = 0


@dataclasses.dataclass(eq=False)
class Outermost:
    """A `comm.capture()` that is part of no other.

    Attributes:
        thread: whose it is.
        joinable: whether others may become part of it: its sessions are entered, and not being left.
        inner: how many are open inside it.
        ended: whether it isn't joinable any more.
    """

    thread: int
    joinable: bool = False
    inner: int = 0
    ended: bool = False

    def begin(self) -> None:
        """Let others join."""
        with _changed:
            self.joinable = True
            _changed.notify_all()

    def end(self) -> int:
        """Let no others join; how many are still open inside it."""
        with _changed:
            self.joinable, self.ended = False, True
            return self.inner


def any_open() -> bool:
    """Whether a `comm.capture()` is open in this process."""
    return _open > 0


@contextlib.contextmanager
def nested() -> Iterator[Outermost | None]:
    """Enter as the outermost one, which is yielded, or as a part of that which is there: None.

    Waits while another thread's is being entered or left: what is recorded then would have no session.

    Raises:
        CaptureError: at the end, where the one that this was a part of has ended before.
    """
    global _current, _open  # noqa: PLW0603 - of the process, like the groups
    me = threading.get_ident()
    with _changed:
        _changed.wait_for(lambda: _current is None or _current.joinable or _current.thread == me)
        whole, mine = _current, None
        if whole is None:
            whole = mine = _current = Outermost(me)
        else:
            whole.inner += 1
        _open += 1
    try:
        yield mine
        if mine is None and whole.ended:
            raise CaptureError(
                "the comm.capture() that this one was a part of has ended before it: graphs captured in this one must "
                "not be replayed. Capture anew"
            )
    finally:
        with _changed:
            _open -= 1
            if mine is None:
                whole.inner -= 1
            else:
                _current = None
                _changed.notify_all()
