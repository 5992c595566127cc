"""The projects that `comm-core new --kernel` writes: their native code compiles, and sums."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import comm_core as comm
import emulation
import pytest
import torch
import torch.distributed as dist
from checked import answers_in
from comm_core import cli, kernels
from compilers import unoptimized
from host_code import needs_compiler
from test_new import installed_in, only

if TYPE_CHECKING:
    from harness import Ranks

CPP, CUDA = "quick_", "peer_pull"
CSRC = {CPP: {"kernel.cpp"}, CUDA: {"kernel.cuh", "binding.cu"}}
# Compiles for one architecture instead of three, which takes a third of the time.
NVCC = """#!/bin/sh
case "$*" in
    --list-gpu-arch) echo compute_90 ;;
    *) exec "{nvcc}" "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("projects")
    for name, kernel in ((CPP, "cpp"), (CUDA, "cuda")):
        assert cli.main(["new", name, "--kernel", kernel, "--folder", str(folder / name)]) == 0
    return {name: folder / name for name in CSRC}


@pytest.fixture(scope="module")
def cpp_site(projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the project for CPUs is installed, its native code in the wheel."""
    needs_compiler()
    return installed_in(tmp_path_factory.mktemp("cpp"), projects[CPP], HATCH_BUILD_HOOKS_ENABLE="1")


def pytest_command(project: Path) -> list[str]:
    """Return the command that runs the project's written test, without faults in hooks that hardly touch its kernel."""
    others = "not in_connect and not recovers and not raises_on_one_rank and not fault_in_suspension"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(project), "-k", others]
    return [sys.executable, "-m", "pytest", *options, str(project / "tests")]


def pytest_environ(site: Path) -> dict[str, str]:
    """Return the environment for it, without GPUs."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def kit_of_cpp(projects: dict[str, Path], cpp_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The written test of the project for CPUs, running beside other tests: one of its tests waits for 20 seconds."""
    log = tmp_path_factory.mktemp("kit") / "log"
    with log.open("w") as output:
        kit = subprocess.Popen(
            pytest_command(projects[CPP]), env=pytest_environ(cpp_site), stdout=output, stderr=subprocess.STDOUT
        )
    yield kit, log
    kit.terminate()
    kit.wait()


@pytest.mark.parametrize(("name", "extras"), [(CPP, {"kernels"}), (CUDA, {"kernels", "memory"})])
def test_the_files(projects: dict[str, Path], name: str, extras: set[str]) -> None:
    project = projects[name]
    texts = {path.relative_to(project).as_posix(): path.read_text() for path in project.rglob("*") if path.is_file()}
    package = f"src/comm_plugin_{name}"
    sources = {f"{package}/csrc/{source}" for source in CSRC[name]}
    assert set(texts) == {"pyproject.toml", "README.md", f"{package}/__init__.py", f"tests/test_{name}.py"} | sources
    assert not [path for path, text in texts.items() if "${" in text]
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 120
    assert "\n[tool.hatch.build.hooks.comm-core]\n" in texts["pyproject.toml"]
    (required,) = (line for line in texts["pyproject.toml"].splitlines() if line.startswith("dependencies"))
    assert f"comm-core[{','.join(sorted(extras))}]" in required


def sums() -> dict[str, Any]:
    rank = dist.get_rank()
    backend = comm.get_backend()
    facts: dict[str, Any] = {"name": backend.name}
    for dtype in (torch.float32, torch.float64):
        x = torch.arange(1001, dtype=dtype) * (rank + 1)
        y = backend.all_reduce(x)
        right = torch.equal(y, torch.arange(1001, dtype=dtype) * 3)
        facts[str(dtype)] = right and backend.all_reduce(x, out=x) is x and torch.equal(x, y)
    route = backend.decision.route("all_reduce", "eager", "cpu", "float32")
    facts["beyond its ranges"] = [route.backend_for(1 << 20), route.backend_for((1 << 20) + 4)]
    comm.close()
    return facts


def test_two_ranks_choose_the_one_for_cpus_and_sum(cpp_site: Path, kit_of_cpp: Any, ranks: Ranks) -> None:
    assert kit_of_cpp
    for facts in ranks.run(sums, world_size=2, path=[[cpp_site]] * 2):
        assert facts == {
            "name": CPP,
            "torch.float32": True,
            "torch.float64": True,
            "beyond its ranges": [CPP, "torch_distributed"],
        }


def answers(site: Path, name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `comm-core check` prints about each topology, if it finds no fault."""
    with only(site):
        status = cli.main(["check", name])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "no faults found" in printed
    return answers_in(printed)


def test_the_one_for_cpus_passes_the_check(cpp_site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = answers(cpp_site, CPP, capsys)
    assert said["cpus-one-host"] == "yes, priority 500"
    assert said["two-hosts-of-4"].startswith("no: its ranks are on 2 hosts")


def test_the_one_for_gpus_is_compiled_and_passes_the_check(
    projects: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = os.pathsep.join([f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        pytest.skip("there is no nvcc on this machine")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(NVCC.format(nvcc=nvcc))
    wrapper.chmod(0o755)
    cxx = str(unoptimized(tmp_path / "bin"))
    site = installed_in(tmp_path, projects[CUDA], HATCH_BUILD_HOOKS_ENABLE="1", CUDA_HOME=str(tmp_path), CXX=cxx)
    assert (site / f"comm_plugin_{CUDA}" / "_lib" / f"comm_plugin_{CUDA}.so").is_file()
    with only(site):
        library = kernels.Library(f"comm_plugin_{CUDA}")
        assert library.missing() is None
        assert callable(library.load().connect)
    said = answers(site, CUDA, capsys)
    assert said["dgx-h100"] == said["two-pcie-p2p"] == "yes, priority 500"
    assert said["cpus-one-host"] == "no: it sums CUDA tensors, and this group has none"


def test_the_kernel_for_gpus_sums_on_cpu_threads(projects: dict[str, Path], tmp_path: Path) -> None:
    csrc = projects[CUDA] / "src" / f"comm_plugin_{CUDA}" / "csrc"
    program = emulation.build(Path(__file__).with_name("emulated_new.cpp"), csrc, tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["every sum is right", "an absent rank is noticed"]


def test_the_one_for_gpus_lists_waits_by_peer(projects: dict[str, Path]) -> None:
    plugin = runpy.run_path(str(projects[CUDA] / "src" / f"comm_plugin_{CUDA}" / "__init__.py"))
    session = SimpleNamespace(native={"waits": lambda: [0, 0, 0, 3, 4500, 2500]})
    assert plugin["waits"](session) == {1: (3, 4.5, 2.5)}


def test_the_written_test_for_cpus_runs_the_conformance_kit(kit_of_cpp: Any) -> None:
    kit, log = kit_of_cpp
    status = kit.wait(timeout=250)
    assert status == 0, log.read_text()
    assert "passed" in log.read_text()
