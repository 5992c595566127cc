"""The protocols, with a CPU thread for each of a GPU's: whoever reads the wrong place or phase is found here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import comm_plugin_customar_v2
import emulation
import pytest

HERE = Path(__file__).parent
CSRC = Path(comm_plugin_customar_v2.__file__).parent / "csrc"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name."""
    return {
        name: emulation.build(HERE / f"{name}.cpp", CSRC, tmp_path_factory.mktemp(name))
        for name in ("emulated", "emulated_norm")
    }


def run(program: Path, world_size: int, rounds: int) -> str:
    command = [program, str(world_size), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# With how many dtypes.
SIZES = {2: 3, 3: 3, 4: 3, 5: 1, 8: 1}


@pytest.mark.parametrize(("world_size", "dtypes"), SIZES.items())
def test_every_algorithm_sums_in_rank_order(programs: dict[str, Path], world_size: int, dtypes: int) -> None:
    assert run(programs["emulated"], world_size, 2).count("every sum is right") == dtypes


@pytest.mark.parametrize(("world_size", "dtypes"), SIZES.items())
def test_fused_and_plain_calls_on_the_same_buffers(programs: dict[str, Path], world_size: int, dtypes: int) -> None:
    assert run(programs["emulated_norm"], world_size, 3).count("every row is right") == dtypes
