"""Hooks in threads: a new thread for a rare hook, a standing one for a frequent one."""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
import sys
import threading
from typing import Any, NoReturn, cast

import pytest
import torch
from comm_core._control.worker import StandingWorker, run_on_device
from comm_core._handle.checker import Checker
from comm_core._handle.session import Session
from comm_core._plugins.discovery import Plugin

PATIENCE_S = 60.0
SHORT_S = 0.05
CPU = torch.device("cpu")


def raising(error: BaseException) -> NoReturn:
    raise error


def session(name: str, check: Any, timeout_s: float = PATIENCE_S) -> Session:
    hooks = {} if check is None else {"check": check}
    return Session(Plugin(name, None, None, hooks), f"session of {name}", cast("Any", None), timeout_s=timeout_s)


def test_a_new_thread_records_no_gradients() -> None:
    thread, grad = run_on_device(
        lambda: (threading.current_thread(), torch.is_grad_enabled()), CPU, PATIENCE_S, "asking"
    )
    assert thread is not threading.current_thread()
    assert not grad


def test_a_standing_worker_has_one_thread() -> None:
    worker = StandingWorker(CPU)
    threads = {worker.run(threading.current_thread, PATIENCE_S, "asking") for _ in range(100)}
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert not worker.run(torch.is_grad_enabled, PATIENCE_S, "asking")


def test_its_thread_ends_with_it() -> None:
    worker = StandingWorker(CPU)
    thread = worker.run(threading.current_thread, PATIENCE_S, "asking")
    del worker
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("its own"), KeyboardInterrupt()])
def test_what_a_call_raises_reaches_the_caller_as_it_is(error: BaseException) -> None:
    worker = StandingWorker(CPU)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            worker.run(lambda: raising(error), PATIENCE_S, "raising")
        assert caught.value is error
    assert worker.run(lambda: 7, PATIENCE_S, "easy") == 7


def test_an_exit_becomes_an_error_with_its_cause() -> None:
    worker = StandingWorker(CPU)
    with pytest.raises(RuntimeError, match=r"leaving raised SystemExit: 3") as caught:
        worker.run(lambda: raising(SystemExit(3)), PATIENCE_S, "leaving")
    assert isinstance(caught.value.__cause__, SystemExit)


def test_a_call_that_hangs_starts_no_other_thread() -> None:
    worker, gate, returned = StandingWorker(CPU), threading.Event(), threading.Event()
    thread = worker.run(threading.current_thread, PATIENCE_S, "asking")
    with pytest.raises(TimeoutError, match=r"the slow one hasn't returned after 0\.05 s"):
        worker.run(lambda: (gate.wait(PATIENCE_S), returned.set()), SHORT_S, "the slow one")
    for _ in range(3):
        with pytest.raises(TimeoutError, match="an earlier call hasn't returned yet"):
            worker.run(lambda: 7, PATIENCE_S, "the next one")
    gate.set()
    returned.wait(PATIENCE_S)
    found = None
    while found is None:
        with contextlib.suppress(TimeoutError):  # the call has returned, but the thread may need a moment
            found = worker.run(threading.current_thread, PATIENCE_S, "asking")
    assert found is thread


def test_callers_of_several_threads_take_turns() -> None:
    worker, wrong = StandingWorker(CPU), []

    def call(number: int) -> None:
        for turn in range(200):
            pair = (number, turn)
            if worker.run(functools.partial(tuple, pair), PATIENCE_S, "asking") != pair:
                wrong.append(pair)

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert wrong == []


FORK = """
import os, torch
from comm_core._control.worker import StandingWorker
worker = StandingWorker(torch.device("cpu"))
assert worker.run(os.getpid, 60, "asking") == os.getpid()
child = os.fork()
if not child:
    os._exit(0 if worker.run(os.getpid, 60, "asking") == os.getpid() else 1)
assert os.waitpid(child, 0)[1] == 0
assert worker.run(os.getpid, 60, "asking") == os.getpid()
"""


def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=PATIENCE_S)


def test_the_first_session_that_fails_is_found() -> None:
    seen: list[str] = []
    checker, error = Checker(CPU), ValueError("a peer timed out")
    sound, silent = session("sound", seen.append), session("silent", None)
    broken, last = session("broken", lambda _: raising(error)), session("last", seen.append)
    assert checker.find_failure([]) is None
    assert checker.find_failure([silent, sound, last]) is None
    assert checker.find_failure([sound, silent, broken, last]) == ("broken", error)
    assert seen == ["session of sound", "session of last", "session of sound"]


def test_a_check_that_hangs_is_named() -> None:
    gate = threading.Event()
    checker = Checker(CPU)
    sessions = [session("sound", lambda _: None), session("stuck", lambda _: gate.wait(PATIENCE_S), SHORT_S)]
    found = checker.find_failure(sessions)
    assert found is not None
    assert (found[0], str(found[1])) == ("stuck", "check hasn't returned after 0.05 s")
    gate.set()


# Processes end while a thread of theirs waits for another rank, and go on for a while after that: two for each store
# and deadline, all forked by one process, as torch's import takes longest. Each prints a line if it ends badly.
EXIT = """
import os, sys, threading, time
import torch.distributed as dist
from comm_core._control.stage import Stage
from comm_core._control.store import Control

class Slow:
    def __del__(self):
        time.sleep(2)

def tcp():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

cases = [(store, timeout_s) for store in (dist.HashStore, tcp) for timeout_s in (1.0, 3600.0) for _ in range(2)]
children = {}
for make, timeout_s in cases:
    child = os.fork()
    if not child:
        break
    children[child] = (make.__name__, timeout_s)
else:
    for child, case in children.items():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 7:
            print(*case, "ended with", status)
    sys.exit()

store = make()
control = Control(store, 0, (0, 1), timeout_s)
control.join(set())

def wait():
    try:
        with Stage(control, "step") as stage:
            stage.barrier()
    except RuntimeError:
        pass

threading.Thread(target=wait, daemon=True).start()
while not store.check([control.prefix + "/step/0/arrived"]):
    time.sleep(0.01)
sys.slow = Slow()
sys.exit(7)
"""


def test_a_process_that_ends_while_a_thread_waits_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXIT], capture_output=True, text=True, timeout=200, check=False
    )
    # C++ says "terminate called" on stderr, and glibc "exception not rethrown".
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
