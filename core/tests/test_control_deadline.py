"""A call under a deadline: its value goes to exactly one taker, its exception to the caller."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import logging
import threading
import time
import weakref
from typing import NoReturn

import pytest
from comm_core._control.deadline import (
    WaitInterruptedError,
    describe,
    is_timeout,
    raises_interrupts,
    run_with_deadline,
    text_of,
)
from odd_errors import Noteless, Textless

PATIENCE_S = 60.0
SHORT_S = 0.05


def raising(error: BaseException) -> NoReturn:
    raise error


def test_the_value_comes_back_from_a_daemon_thread() -> None:
    thread = run_with_deadline(threading.current_thread, PATIENCE_S, name="asking")
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert "asking" in thread.name


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("its own"), KeyboardInterrupt()])
def test_what_it_raises_reaches_the_caller_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        run_with_deadline(lambda: raising(error), PATIENCE_S, name="raising")
    assert caught.value is error


def test_an_exit_becomes_an_error_with_its_cause() -> None:
    with pytest.raises(RuntimeError, match=r"leaving raised SystemExit: 3") as caught:
        run_with_deadline(lambda: raising(SystemExit(3)), PATIENCE_S, name="leaving")
    assert isinstance(caught.value.__cause__, SystemExit)


def test_a_late_value_goes_to_on_late_in_its_own_thread() -> None:
    gate = threading.Event()
    arrived: concurrent.futures.Future[tuple[str, str]] = concurrent.futures.Future()

    def slow() -> str:
        gate.wait(PATIENCE_S)
        return "session"

    def on_late(value: str) -> None:
        arrived.set_result((value, threading.current_thread().name))

    with pytest.raises(TimeoutError, match=r"the slow one hasn't returned after 0\.05 s"):
        run_with_deadline(slow, SHORT_S, name="the slow one", on_late=on_late)
    assert not arrived.done()
    gate.set()
    assert arrived.result(PATIENCE_S) == ("session", "comm-core the slow one")


def test_an_interrupted_wait_leaves_the_value_to_on_late(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    arrived: concurrent.futures.Future[bool] = concurrent.futures.Future()
    monkeypatch.setattr(concurrent.futures, "wait", lambda *_: raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_with_deadline(lambda: gate.wait(PATIENCE_S), PATIENCE_S, name="waiting", on_late=arrived.set_result)
    gate.set()
    assert arrived.result(PATIENCE_S) is True


def test_what_a_signal_handler_raises_in_the_wait_is_told_from_what_the_function_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, error = threading.Event(), TimeoutError("the program's own")
    arrived: concurrent.futures.Future[bool] = concurrent.futures.Future()
    monkeypatch.setattr(concurrent.futures, "wait", lambda *_: raising(error))

    @raises_interrupts
    def call() -> bool:
        with pytest.raises(WaitInterruptedError) as caught:
            run_with_deadline(lambda: gate.wait(PATIENCE_S), PATIENCE_S, name="waiting", on_late=arrived.set_result)
        assert describe(caught.value) == "TimeoutError: the program's own"
        raise caught.value

    with pytest.raises(TimeoutError, match="own") as caught:
        call()
    assert caught.value is error
    gate.set()
    assert arrived.result(PATIENCE_S) is True


@pytest.mark.parametrize("fails_in", ["function", "on_late"])
def test_what_fails_late_is_logged(fails_in: str, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()

    def slow() -> None:
        gate.wait(PATIENCE_S)
        if fails_in == "function":
            raise ValueError("too late")

    with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError):
        run_with_deadline(slow, SHORT_S, name="the slow one", on_late=lambda _: raising(ValueError("too late")))
    assert not caplog.text
    gate_opens_and_thread_ends(gate, "comm-core the slow one")
    assert "the slow one" in caplog.text
    assert "ValueError: too late" in caplog.text


def gate_opens_and_thread_ends(gate: threading.Event, name: str) -> None:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    gate.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_late_value_without_a_handler_is_dropped() -> None:
    gate = threading.Event()
    with pytest.raises(TimeoutError):
        run_with_deadline(lambda: gate.wait(PATIENCE_S), SHORT_S, name="the dropped one")
    gate_opens_and_thread_ends(gate, "comm-core the dropped one")


def test_a_value_is_taken_exactly_once_however_close_the_deadline() -> None:
    for turn in range(300):
        taken: list[str] = []

        def close_call(duration_s: float = turn % 20 * 0.0001) -> str:
            time.sleep(duration_s)
            return "value"

        with contextlib.suppress(TimeoutError):
            taken.append(run_with_deadline(close_call, 0.001, name=f"call {turn}", on_late=taken.append))
        join_all(f"comm-core call {turn}")
        assert taken == ["value"]


def join_all(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(PATIENCE_S)


def test_a_failed_call_keeps_nothing_alive() -> None:
    class Buffer:
        pass

    kept: list[weakref.ref[Buffer]] = []

    def failing() -> None:
        buffer = Buffer()
        kept.append(weakref.ref(buffer))
        raise ValueError("no")

    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            run_with_deadline(failing, PATIENCE_S, name="failing")
        join_all("comm-core failing")
        assert kept[0]() is None
    finally:
        gc.enable()


def test_an_endless_deadline_is_one() -> None:
    assert run_with_deadline(lambda: 7, float("inf"), name="easy") == 7


def test_describe_keeps_to_one_line_and_survives_a_broken_str() -> None:
    assert describe(ImportError("first\n  second")) == "ImportError: first second"
    assert describe(Textless()) == "odd_errors.Textless: <exception str() failed>"
    assert describe(Noteless()) == "Noteless"


def test_the_text_of_an_error_is_never_an_error() -> None:
    assert text_of(ValueError("first\n  second")) == "first\n  second"
    assert text_of(Textless()) == "odd_errors.Textless: <exception str() failed>"


@pytest.mark.timeout(20)
def test_an_error_that_is_its_own_cause_is_looked_at_once() -> None:
    alone, first, second = RuntimeError("no"), RuntimeError("no"), RuntimeError("no")
    alone.__cause__ = alone
    first.__cause__, second.__cause__ = second, first
    assert not is_timeout(alone)
    assert not is_timeout(first)
    last = TimeoutError()
    second.__cause__, last.__cause__ = last, first
    assert is_timeout(first)
