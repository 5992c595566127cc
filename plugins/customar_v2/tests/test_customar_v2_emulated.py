"""The protocols, with a CPU thread for each of a GPU's: whoever reads the wrong place or phase is found here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import comm_plugin_customar_v2
import emulation
import pytest

# A compiler's minutes, on a busy machine.
pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent
CSRC = Path(comm_plugin_customar_v2.__file__).parent / "csrc"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name."""
    return {
        name: emulation.build(HERE / f"{name}.cpp", CSRC, tmp_path_factory.mktemp(name))
        for name in ("emulated", "emulated_norm", "emulated_wire")
    }


def run(program: Path, world_size: int, rounds: int) -> str:
    command = [program, str(world_size), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_length_of_row_has_a_launch_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "tvm/ffi/extra").mkdir(parents=True)
    (tmp_path / "tvm/ffi/extra/c_env_api.h").touch()
    shutil.copy(emulation.SHARED / "fake_tvm.h", tmp_path / "tvm/ffi/tvm_ffi.h")
    program = emulation.build(HERE / "launches.cpp", CSRC, tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    judged, _, words = done.stdout.partition(" ")
    assert int(judged) > 100_000
    assert words == "launches are right\n"


# With how many dtypes. More ranks take minutes on two processors: with SOAK_EMULATION=1.
SIZES = {2: 3, 3: 1} | ({4: 1, 5: 1, 8: 1} if os.environ.get("SOAK_EMULATION") else {})


@pytest.mark.parametrize(("world_size", "dtypes"), SIZES.items())
def test_every_algorithm_sums_in_rank_order(programs: dict[str, Path], world_size: int, dtypes: int) -> None:
    assert run(programs["emulated"], world_size, 2).count("every sum is right") == dtypes


@pytest.mark.parametrize(("world_size", "dtypes"), SIZES.items())
def test_fused_and_plain_calls_on_the_same_buffers(programs: dict[str, Path], world_size: int, dtypes: int) -> None:
    rounds = 2 if world_size < 8 else 1
    assert run(programs["emulated_norm"], world_size, rounds).count("every row is right") == dtypes


@pytest.mark.parametrize(("world_size", "dtypes"), [(size, min(dtypes, 2)) for size, dtypes in SIZES.items()])
def test_sums_over_the_wire_among_exact_ones(programs: dict[str, Path], world_size: int, dtypes: int) -> None:
    assert run(programs["emulated_wire"], world_size, 2).count("every sum is right") == dtypes
