"""The kernels on the CPU, one thread for each of a GPU's: finds a kernel that reads a wrong place or phase."""

from __future__ import annotations

import subprocess
from pathlib import Path

import comm_plugin_customar_v1
import emulation
import pytest

# A compiler's minutes, on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    csrc = Path(comm_plugin_customar_v1.__file__).parent / "csrc"
    return emulation.build(Path(__file__).parent / "emulated.cpp", csrc, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(("world_size", "dtypes"), [(2, 3), (4, 1), (6, 1), (8, 1)])
def test_both_algorithms_sum_in_rank_order(program: Path, world_size: int, dtypes: int) -> None:
    done = subprocess.run([program, str(world_size), "3"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every sum is right") == dtypes
    assert "every test page is right" in done.stdout
    assert world_size > 4 or "every other message is noticed" in done.stdout
    assert world_size > 2 or "every wait is counted" in done.stdout
