"""What several of core's tests share."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Hypothesis measures how fast its data comes, which on a busy machine says nothing.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """operands.cpp, compiled once for all workers of a parallel run."""
    from host_code import binding, needs_compiler

    needs_compiler()
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "operands"
    folder.mkdir(exist_ok=True)
    built = folder / "operands.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            binding(folder, Path(__file__).with_name("operands.cpp"))
    import tvm_ffi

    return tvm_ffi.load_module(str(built))
