"""A session with kernels: what it reports of late peers and waits, what follows an abort, and its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import comm_core as comm
import pytest
import torch
from comm_core import kernel_session
from comm_core.kernel_session import KernelSession


class Native:
    """Native functions of the second of three ranks."""

    def __init__(self) -> None:
        self.late = 0
        self.aborts = 0

    def error(self) -> int:
        return self.late

    def waits(self) -> list[int]:
        return [2, 3000, 2500, 0, 0, 0, 1, 4500, 4500]

    def abort(self) -> None:
        self.aborts += 1


class Buffer:
    """A buffer of this process alone, which begins with the launch counter."""

    nbytes = 64

    def __init__(self) -> None:
        self.tensor = torch.zeros(self.nbytes, dtype=torch.uint8)
        self.calls: list[str] = []

    def suspend(self) -> None:
        self.calls.append("suspend")

    def resume(self) -> None:
        self.calls.append("resume")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    kept: list[Any] = []
    monkeypatch.setattr(kernel_session, "_kept_until_exit", kept)
    return kept


@pytest.fixture
def session(kept: list[Any]) -> KernelSession:
    assert kept == []
    context = SimpleNamespace(rank=1, global_ranks=(4, 5, 6), wait_timeout_s=2.5)
    return KernelSession(Native(), cast("Any", Buffer()), cast("Any", context))


def calls_of(session: KernelSession) -> list[str]:
    return cast("Any", session.buffer).calls  # type: ignore[no-any-return]


def test_a_late_peer_is_named(session: KernelSession) -> None:
    session.check()
    session.native.late = 3
    for _ in range(2):
        with pytest.raises(comm.CommTimeoutError) as caught:
            session.check()
        assert caught.value.ranks == (2,)
        message = r"rank 2 (6 in the job) didn't come within 2.5 s, or called with another size or dtype"
        assert str(caught.value).startswith(message)


def test_waits_are_by_peer_in_microseconds(session: KernelSession) -> None:
    assert session.waits() == {0: (2, 3.0, 2.5), 2: (1, 4.5, 4.5)}


def test_after_an_abort_replays_alone_are_reported(session: KernelSession) -> None:
    session.native.late = 3
    session.abort()
    assert session.native.aborts == 1
    for _ in range(2):
        session.check()
    session.buffer.tensor[:8].view(torch.int64).add_(1)
    with pytest.raises(comm.CommError, match="in the replay of a graph"):
        session.check()
    session.check()


def test_the_buffers_memory_is_given_back_and_taken_again(session: KernelSession) -> None:
    assert session.memory_nbytes == 64
    session.suspend()
    session.resume()
    assert calls_of(session) == ["suspend", "resume"]


@pytest.mark.parametrize("orderly", [True, False])
def test_the_end_frees_nothing_under_running_kernels(session: KernelSession, kept: list[Any], orderly: bool) -> None:
    native = session.native
    native.late = 1
    for _ in range(2):
        session.close(orderly)
    assert calls_of(session) == ["close"] * orderly
    assert native.aborts == (not orderly)
    assert kept == ([] if orderly else [(native, session.buffer)])
    session.check()
    session.abort()
    assert session.waits() == {}
    assert native.aborts == (not orderly)
