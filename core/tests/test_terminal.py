"""Reports on a terminal, and what a shell completes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from comm_core.cli import _terminal
from comm_core.cli._system import describe_system

REPORT = """backend            priority  verdict      reason
shm 0.1.0               300  serves       available on every rank
nccl 0.1.0                -  unavailable  serves CUDA tensors  only
mine 0.1.0              500  failed       rank 1: it failed

  shm 0.1.0: loaded; missing: no
  old 0.1.0: can't be used: it failed
Nothing to fix."""


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """What `show` writes to a terminal."""
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        _terminal.show(text)
    written = b""
    while chunk := _read(primary):
        written += chunk
    os.close(primary)
    return written.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # its other end is closed
        return b""


def test_verdicts_are_colored_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = on_a_terminal(monkeypatch, REPORT)
    marked = [part.partition("\033[0m")[0] for part in shown.split("\033[3")[1:]]
    assert marked == ["2mserves", "3munavailable", "1mfailed", "2mloaded", "1mcan't be used", "2mNothing to fix."]


def test_lines_are_folded_below_their_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "50")
    text = """backend     verdict      reason
shm 0.1.0   unavailable  it sums CPU tensors, and this group has none
  packages: numpy 2.4.6, pluggy 1.7.0, torch 2.13.0+cpu
a-path/that/is/longer/than/the/terminal/and/has/no/space
short"""
    assert on_a_terminal(monkeypatch, text).splitlines() == [
        "backend     verdict      reason",
        "shm 0.1.0   unavailable  it sums CPU tensors, and",
        "                         this group has none",
        "  packages: numpy 2.4.6, pluggy 1.7.0, torch",
        "    2.13.0+cpu",
        "a-path/that/is/longer/than/the/terminal/and/has/no/space",
        "short",
    ]


@pytest.mark.parametrize("piped", [False, True])
def test_a_pipe_and_no_color_get_the_text_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], piped: bool
) -> None:
    if piped:
        _terminal.show(REPORT)
        assert capsys.readouterr().out == REPORT + "\n"
    else:
        monkeypatch.setenv("NO_COLOR", "1")
        assert on_a_terminal(monkeypatch, REPORT) == REPORT + "\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("comm-core do", ["doctor"]),
        ("comm-core explain --to", ["--topology"]),
        ("comm-core bench --ba", ["--backends"]),
    ],
)
def test_a_shell_completes_commands_and_options(tmp_path: Path, line: str, expected: list[str]) -> None:
    # As the script of register-python-argcomplete calls it.
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_SHELL": "bash"}
    code = "from comm_core.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert [found.strip() for found in answer.read_text().split("\n")] == expected


def test_the_machine_is_described_in_words() -> None:
    unknown: dict[str, str] = {}
    found = describe_system({"GLOO_SOCKET_IFNAME": "eth7"}, unknown)
    assert unknown == {}
    assert found["Gloo's interface"] == "eth7, by GLOO_SOCKET_IFNAME"
    assert f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable here" in found["processor"]
    assert "pluggy " in found["packages"]
    assert found.keys() >= {"os", "gcc", "nvcc"}
