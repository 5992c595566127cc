"""What an earlier process says of the plugin that crashed it: in the log of the next one, and in `comm-core doctor`."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comm_core import cli
from comm_core._plugins import crashes
from harness import install

# Without torch: quick. Its arguments are the cache's folder and what happens within the hook.
PROCESS = """
import logging, os, signal, sys, threading, time
from comm_core._control.journal import journaled
from comm_core._plugins import crashes

logging.basicConfig()
crashes.warn_of_crashes(sys.argv[1])
journaled("probe of other", lambda: None)()
threading.Thread(target=journaled("connect of late", lambda: time.sleep(3600)), daemon=True).start()
journaled("connect of acme", lambda: exec(sys.argv[2]))()
"""
CRASH = "signal.raise_signal(signal.SIGSEGV)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def process(folder: Path, within: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), within]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def files(folder: Path) -> list[Path]:
    return list((folder / "running").iterdir())


def test_the_next_process_names_what_crashed_the_last_and_the_ones_after_it_are_silent(folder: Path) -> None:
    assert process(folder, CRASH).returncode == -signal.SIGSEGV
    assert process(folder, CRASH).returncode == -signal.SIGSEGV  # names the first, and crashes too
    told = process(folder, "pass").stderr
    assert told.count("ended within ") == 1
    assert "WARNING:comm_core:process " in told
    assert "ended within connect of late, connect of acme: it crashed there or was killed. If it crashed, " in told
    assert "COMM_CORE_DISABLE=late,acme" in told
    assert process(folder, "pass").stderr == ""
    assert len(crashes.earlier_crashes(str(folder))) == 2


@pytest.mark.parametrize(
    "end", ["pass", "sys.exit(3)", "raise ValueError", "crashes.end_journal(); os._exit(3)", "crashes.stop_watching()"]
)
def test_a_process_that_ends_by_itself_leaves_no_file(folder: Path, end: str) -> None:
    process(folder, end)
    assert files(folder) == []


def test_a_file_system_without_locks_is_left_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(crashes, "_watching", True)
    monkeypatch.setattr(crashes, "_files", {})
    for _ in range(3):
        crashes.warn_of_crashes(str(folder))
    # Those of other tests come and go.
    assert [path for path in map(Path.resolve, Path("/proc/self/fd").iterdir()) if path.is_relative_to(folder)] == []
    assert files(folder) == []


def test_a_process_that_lives_is_no_crash(folder: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(folder), "print('here', flush=True); time.sleep(3600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "here\n"
        assert process(folder, "pass").stderr == ""
        living.kill()
    assert "connect of acme" in process(folder, "pass").stderr


def test_a_forked_process_has_no_part_in_the_file(folder: Path) -> None:
    fork = "child = os.fork(); child or os.execv('/bin/true', ['true']); os.waitpid(child, 0); " + CRASH
    assert process(folder, fork).returncode == -signal.SIGSEGV
    assert process(folder, "os.fork() or (journaled('x of y', lambda: None)(), os._exit(0)); os.wait(); " + CRASH)
    assert process(folder, "pass").stderr.count("connect of late, connect of acme") == 1


def test_what_no_process_wrote_is_removed_and_what_is_old_is_forgotten(folder: Path) -> None:
    process(folder, CRASH)
    (crash,) = files(folder)
    for number, text in enumerate(("", "{", "[]", '{"running": ["x of y"]}', '{"running": 3}')):
        crash.with_name(f"{number}.json").write_text(text)
    assert crashes.earlier_crashes(str(folder)) == []  # none is logged yet
    day = time.time() - 25 * 3600
    os.utime(crash, (day, day))
    assert process(folder, "pass").stderr == ""
    assert files(folder) == []


@pytest.mark.parametrize("text", ["a file", "no folder"])
def test_without_a_cache_nothing_is_remembered_and_nothing_fails(tmp_path: Path, text: str) -> None:
    place = tmp_path / "file"
    place.write_text(text)
    assert process(place / "cache" if text == "no folder" else place, "pass").returncode == 0


def test_doctor_tells_before_it_imports_and_lists_it_until_it_is_removed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = install(tmp_path / "acme", "acme", "import signal\nsignal.raise_signal(signal.SIGSEGV)")
    environ = {**os.environ, "PYTHONPATH": str(place), "COMM_CORE_CACHE_DIR": str(folder), "COMM_CORE_PLUGINS": "acme"}
    command = [sys.executable, "-m", "comm_core", "doctor"]
    for said in ("", "ended within the import of acme"):
        crashed = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
        assert crashed.returncode == -signal.SIGSEGV
        assert said in crashed.stderr
    monkeypatch.setattr(crashes, "_files", {})  # as in a new process
    monkeypatch.setenv("COMM_CORE_CACHE_DIR", str(folder))
    monkeypatch.setenv("COMM_CORE_PLUGINS", "none")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("ended within the import of acme: it crashed there or was killed") == 2
    assert "COMM_CORE_DISABLE=acme. To forget it: rm " in shown
    for file in files(folder):
        file.unlink()
    cli.main(["doctor"])
    assert "the import of acme" not in capsys.readouterr().out
