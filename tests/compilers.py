"""C++ compilers for tests that aren't about fast code."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["unoptimized"]


def unoptimized(folder: Path) -> Path:
    """Write a C++ compiler to the folder that doesn't optimise, which takes half of the time; return its path."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler
