"""Host code in C++ that is compiled for a test."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from comm_core import kernels
from comm_core._native import toolchain

__all__ = ["CUDA", "binding", "compiled", "needs_compiler"]

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
_CXX = os.environ.get("CXX", "c++")


def needs_compiler() -> None:
    """Skip where there is none."""
    if shutil.which(_CXX) is None:
        pytest.skip(f"there is no C++ compiler ({_CXX}) on this machine")


def compiled(folder: Path, *arguments: str | Path) -> None:
    """Run the compiler in a folder, core's headers and CUDA's at hand."""
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{kernels.include_dir()}", f"-isystem{CUDA}"]
    done = subprocess.run(
        [_CXX, *flags, *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr


def binding(folder: Path, source: str | Path, *arguments: str) -> Path:
    """A source that apache-tvm-ffi binds, as a shared object in the folder."""
    *includes, library = toolchain._bindings()
    built = folder / f"{Path(source).stem}.so"
    flags = ["-shared", "-fPIC", *(f"-isystem{path}" for path in includes)]
    compiled(folder, *flags, source, "-o", built, f"-L{library}", "-ltvm_ffi", *arguments)
    return built
