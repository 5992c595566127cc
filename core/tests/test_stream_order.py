"""The order of a session's launches on several streams, compiled and run against a stand-in for the CUDA runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emulation


def test_calls_follow_each_other_on_streams_that_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "tvm/ffi").mkdir(parents=True)
    shutil.copy(emulation.SHARED / "fake_tvm.h", tmp_path / "tvm/ffi/tvm_ffi.h")
    program = emulation.build(Path(__file__).parent / "stream_order.cpp", tmp_path, tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("0 failures\n", 0), done.stderr
