from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import comm_core

SOURCE = str(Path(comm_core.__file__).parents[1])


def in_a_fresh_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code where every place that an import could write to is `folder`."""
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_EXTENSIONS_DIR"), str(folder))
    environ = {**os.environ, **places, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, timeout=240, check=False
    )


def test_the_import_does_nothing(tmp_path: Path) -> None:
    code = """
import os, sys, threading
before = dict(os.environ)
import comm_core
assert "torch" not in sys.modules, "torch was imported"
assert "pynvml" not in sys.modules, "NVML was imported"
assert dict(os.environ) == before, "the environment was changed"
assert threading.active_count() == 1, threading.enumerate()
"""
    result = in_a_fresh_process(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_the_parts_that_need_torch_start_no_cuda(tmp_path: Path) -> None:
    code = """
import comm_core
comm_core.get_backend, comm_core.Backend
import torch
assert not torch.cuda.is_initialized()
"""
    result = in_a_fresh_process(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_every_public_name_is_there() -> None:
    assert [name for name in comm_core.__all__ if not hasattr(comm_core, name)] == []
    assert dir(comm_core) == sorted(comm_core.__all__)
