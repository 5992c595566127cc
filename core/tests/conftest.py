"""What several of core's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """operands.cpp, compiled."""
    from host_code import binding, needs_compiler

    needs_compiler()
    built = binding(tmp_path_factory.mktemp("operands"), Path(__file__).with_name("operands.cpp"))
    import tvm_ffi

    return tvm_ffi.load_module(str(built))
