"""Bounded and counted waits, compiled and run against a stand-in for the GPU's clock and memory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulation


def test_waits_end_and_long_ones_are_counted(tmp_path: Path) -> None:
    program = emulation.build(Path(__file__).parent / "spin_guard.cpp", tmp_path, tmp_path, kept=["wait"])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("0 failures\n", 0), done.stderr
