"""What sessions with kernels take from `comm_core/host.h`, compiled and run against a stand-in for the CUDA runtime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import emulation


def check(name: str, folder: Path) -> None:
    """Compile a program of this folder and run it."""
    (folder / "tvm/ffi").mkdir(parents=True)
    shutil.copy(emulation.SHARED / "fake_tvm.h", folder / "tvm/ffi/tvm_ffi.h")
    program = emulation.build(Path(__file__).parent / name, folder, folder)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("0 failures\n", 0), done.stderr


def test_calls_follow_each_other_on_streams_that_come_and_go(tmp_path: Path) -> None:
    check("stream_order.cpp", tmp_path)


def test_a_session_that_ends_in_a_foreign_thread_creates_no_context_there(tmp_path: Path) -> None:
    check("deferred_frees.cpp", tmp_path)
