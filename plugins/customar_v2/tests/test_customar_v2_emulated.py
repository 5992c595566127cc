"""The protocols, with a CPU thread for each of a GPU's: whoever reads the wrong place or phase is found here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import comm_plugin_customar_v2
import pytest
from comm_core import kernels

HERE = Path(__file__).parent
CSRC = Path(comm_plugin_customar_v2.__file__).parent / "csrc"
CXX = os.environ.get("CXX", "c++")
# Replaced as a whole by fake_ptx.h.
PTX = ("memory", "pdl", "epoch", "wait")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if shutil.which(CXX) is None or not (cuda / "cuda_bf16.h").is_file():
        pytest.skip(f"there is no C++ compiler ({CXX}), or there are no CUDA headers in {cuda}, on this machine")
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(kernels.include_dir() / "comm_core", folder / "comm_core")
    for name in PTX:
        (folder / "comm_core" / f"{name}.cuh").write_text("#pragma once\n")
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas", f"-I{folder}", f"-I{CSRC}", f"-isystem{cuda}"]
    command = [CXX, *flags, str(HERE / "emulated.cpp"), "-o", str(folder / "emulated")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "emulated"


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_algorithm_sums_in_rank_order(program: Path, world_size: int) -> None:
    done = subprocess.run([program, str(world_size), "2"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every sum is right") == 3
