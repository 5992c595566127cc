"""Compile a program that runs kernels on CPU threads; see core/tests/emulation/emulate.h."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest
from comm_core import kernels

__all__ = ["build"]

SHARED = Path(__file__).parents[1] / "core" / "tests" / "emulation"
CXX = os.environ.get("CXX", "c++")
# Core's headers that fake_ptx.h replaces.
PTX = ("memory", "pdl", "epoch", "clock", "wait", "cluster")


def build(source: Path, csrc: Path, folder: Path, kept: Collection[str] = ()) -> Path:
    """Compile a program that includes kernels, and return its path; skip the test if the machine has no compiler.

    Args:
        source: the program's C++ file.
        csrc: the folder of the kernels.
        folder: an empty folder for the build.
        kept: names in `PTX` of headers that aren't replaced.
    """
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if shutil.which(CXX) is None or not (cuda / "cuda_bf16.h").is_file():
        pytest.skip(f"this machine lacks a C++ compiler ({CXX}) or CUDA headers in {cuda}")
    shutil.copytree(kernels.include_dir() / "comm_core", folder / "comm_core")
    for name in set(PTX) - set(kept):
        (folder / "comm_core" / f"{name}.cuh").write_text("#pragma once\n")
    flags = ["-std=c++20", "-O0", "-pthread", "-Wno-unknown-pragmas"]
    folders = [f"-I{folder}", f"-I{csrc}", f"-I{SHARED}", f"-isystem{cuda}"]
    program = folder / source.stem
    command = [CXX, *flags, *folders, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return program
