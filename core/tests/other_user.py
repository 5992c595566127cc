"""Run code as another user of this machine, for tests that run as root."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable

import pytest

#: The user "nobody" on every Linux.
UID = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run the tests as root")


def as_other_user(call: Callable[[], object]) -> str:
    """Call a function in a child process of another user; return its result's text, or the type of its exception."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child runs no code of other threads
        pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            signal.alarm(60)
            os.setgroups([])
            os.setgid(UID)
            os.setuid(UID)
            try:
                text = f"returned {call()}"
            except OSError as error:
                text = type(error).__name__ if type(error) is not OSError else str(error)
            except BaseException:  # noqa: BLE001 - the parent's test shows it
                text = traceback.format_exc()
            os.write(writing, text.encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text
