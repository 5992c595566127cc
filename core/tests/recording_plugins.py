"""Backends that register what a capture records, and that prepare for shapes; with one fault each.

They record on the CPU: `fake_capture` makes the stream say that it captures. What happened is in faulty_plugins.LOG.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import comm_core as comm
import torch
from faulty_plugins import DTYPES, LOG, MAX_NBYTES, RELEASE, Good, Session
from harness import side_store


@contextlib.contextmanager
def fake_capture() -> Iterator[None]:
    """Make torch say that there is CUDA and that the current stream captures."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        yield


@dataclasses.dataclass
class Recorded(Session):
    """A session that keeps what was recorded, and what all ranks registered."""

    control: Any = None
    rows: list[int] = dataclasses.field(default_factory=list)
    registered: list[list[list[int]]] = dataclasses.field(default_factory=list)


class Records(Good):
    """Registers the sizes of the calls that a stream captured; serves small messages."""

    def open(self, context: comm.GroupContext) -> Recorded:
        name = context.control.all_gather(uuid.uuid4().hex)[0]
        return Recorded(name, context.rank, context.world_size, side_store().clone(), control=context.control)

    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            assert isinstance(session, Recorded)
            session.rows.append(tensor.numel())
            return tensor.clone()  # nothing runs while it is captured
        return super().sum(session, tensor)

    @comm.hookimpl
    @contextlib.contextmanager
    def capture_ctx(self, session: Recorded) -> Iterator[None]:
        self.note(session, "enter")
        self.enter()
        try:
            yield
        except BaseException as error:
            self.note(session, f"left by {type(error).__name__}")
            session.rows.clear()
            self.leave_by()
            raise
        rows, session.rows = session.rows, []
        self.note(session, "leave")
        if rows:
            self.before_exchange()
            found = session.control.all_gather(rows)
            self.after_exchange()
            session.registered.append(found)

    def note(self, session: Recorded, event: str) -> None:
        LOG.append((self.name, session.id, event))

    def enter(self) -> None:
        """Where it may fail."""

    def leave_by(self) -> None:
        """As `enter`."""

    def before_exchange(self) -> None:
        """As `enter`."""

    def after_exchange(self) -> None:
        """As `enter`."""


class _Once(Records):
    """Its fault happens in the first capture of each process alone."""

    left = 1

    def fail(self) -> None:
        if self.faulty and self.left:
            self.left -= 1
            raise OSError("the address can't be exported")


class Lingers(Records):
    """Is in no hurry to be entered and left: waits until `RELEASE` is set. Records nothing before it is entered."""

    ready = False

    def enter(self) -> None:
        assert RELEASE.wait(60)
        self.ready = True

    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        assert self.ready or not torch.cuda.is_available()
        return super().sum(session, tensor)

    def before_exchange(self) -> None:
        assert RELEASE.wait(60)


class EnterRaises(_Once):
    def enter(self) -> None:
        self.fail()


class RaisesBeforeExchange(_Once):
    def before_exchange(self) -> None:
        self.fail()


class RaisesAfterExchange(_Once):
    def after_exchange(self) -> None:
        self.fail()


class LeaveByRaises(_Once):
    def leave_by(self) -> None:
        self.fail()


class Swallows(Records):
    """Swallows what passes through its context, which it must not."""

    @comm.hookimpl
    def capture_ctx(self, session: Recorded) -> Any:  # type: ignore[override]
        inner = super().capture_ctx(session)

        class Context:
            def __enter__(self) -> None:
                inner.__enter__()

            def __exit__(self, *error: object) -> bool:
                with contextlib.suppress(BaseException):
                    inner.__exit__(*error)  # type: ignore[arg-type]
                return True

        return Context()


class Prepares(Records):
    """Serves a few elements at once, and what was prepared, up to `MAX_NBYTES`, only then."""

    #: Bytes that it serves unprepared.
    AT_ONCE_NBYTES = 8

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        assert topology.one_host
        ranges = (
            comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=self.AT_ONCE_NBYTES),
            comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=MAX_NBYTES, prepared=True),
        )
        return comm.Available(self.priority, ranges[not self.AT_ONCE_NBYTES :])

    @comm.hookimpl
    def pre_capture_init(self, session: Recorded, shapes: comm.Shapes) -> Sequence[comm.Range] | None:
        self.note(session, f"prepare {shapes.max_tokens}x{shapes.hidden_size} {shapes.dtype}")
        nbytes = shapes.max_tokens * shapes.hidden_size * shapes.dtype.itemsize
        return self.prepared(session, nbytes)

    def prepared(self, session: Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        session.control.barrier()
        return [comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=nbytes, prepared=True)]


class PreparesFromNothing(Prepares):
    """Serves nothing before it was prepared: no session is connected until then."""

    AT_ONCE_NBYTES = 0


class PrepareRaises(Prepares):
    def prepared(self, session: Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        if self.faulty:
            raise MemoryError("no room for the workspace")
        return super().prepared(session, nbytes)


class PrepareRaisesFromNothing(PrepareRaises):
    AT_ONCE_NBYTES = 0


class PreparesTooMuch(Prepares):
    def prepared(self, session: Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        session.memory_nbytes = (1 << 62) * self.faulty
        return super().prepared(session, nbytes)


class PreparesLess(Prepares):
    """One rank has room for half only."""

    def prepared(self, session: Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        return super().prepared(session, nbytes // (1 + self.faulty))


class PreparesNothing(Prepares):
    """Has `answer` for its ranges."""

    answer: Sequence[comm.Range] | None = None

    def prepared(self, session: Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        super().prepared(session, nbytes)
        return self.answer


class PreparesAnEmptyList(PreparesNothing):
    answer = ()


class PreparesWhatItHasNot(PreparesNothing):
    answer = (comm.Range("all_reduce_add_rms_norm"),)


class SumsWrongOncePrepared(Prepares):
    def prepared(self, session: Recorded, nbytes: int) -> Sequence[comm.Range] | None:
        self.wrong = True
        return super().prepared(session, nbytes)

    wrong = False

    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        return super().sum(session, tensor) + (self.wrong and self.faulty)
