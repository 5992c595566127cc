"""The kernels, with a CPU thread for each of a GPU's: whoever reads the wrong place or phase is found here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import comm_plugin_customar_v1
import emulation
import pytest


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    csrc = Path(comm_plugin_customar_v1.__file__).parent / "csrc"
    return emulation.build(Path(__file__).parent / "emulated.cpp", csrc, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(("world_size", "dtypes"), [(2, 3), (4, 3), (6, 1), (8, 1)])
def test_both_algorithms_sum_in_rank_order(program: Path, world_size: int, dtypes: int) -> None:
    done = subprocess.run([program, str(world_size), "3"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every sum is right") == dtypes
    assert "every letter is right" in done.stdout
