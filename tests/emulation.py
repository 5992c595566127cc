"""Compiles a program that runs kernels on CPU threads, see core/tests/emulation/emulate.h."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from comm_core import kernels

__all__ = ["build"]

SHARED = Path(__file__).parents[1] / "core" / "tests" / "emulation"
CXX = os.environ.get("CXX", "c++")
# Core's headers that fake_ptx.h replaces as a whole.
PTX = ("memory", "pdl", "epoch", "wait", "cluster")


def build(source: Path, csrc: Path, folder: Path) -> Path:
    """The program of `source`, which includes headers of the package folder `csrc`; skips where it can't be compiled.

    Args:
        source: a C++ file.
        csrc: where the kernels are.
        folder: an empty one, where to build.
    """
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if shutil.which(CXX) is None or not (cuda / "cuda_bf16.h").is_file():
        pytest.skip(f"there is no C++ compiler ({CXX}), or there are no CUDA headers in {cuda}, on this machine")
    shutil.copytree(kernels.include_dir() / "comm_core", folder / "comm_core")
    for name in PTX:
        (folder / "comm_core" / f"{name}.cuh").write_text("#pragma once\n")
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas"]
    folders = [f"-I{folder}", f"-I{csrc}", f"-I{SHARED}", f"-isystem{cuda}"]
    program = folder / source.stem
    command = [CXX, *flags, *folders, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return program
