"""The wheel of comm-plugin-customar-v2 with its kernels, built once as `make wheels` builds it.

No kernel spills registers on any architecture, and the installed wheel works without a compiler.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from wheelhouse import KERNEL_ENTRY, ROOT, BuildWheel, Built, Pip, Venv, compile_wheel, read_metadata

ALGORITHMS = ("oneshot_push", "oneshot_stream", "twoshot_push")
FUSED = ("oneshot_push_norm", "twoshot_push_norm")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

LOAD = """
from comm_core.kernels import Library
library = Library("comm_plugin_customar_v2")
print(library.missing(), *library.load().constants())
"""

# Two ranks without a CUDA device.
TOPOLOGY = ROOT / "core" / "src" / "comm_core" / "_topologies" / "cpus-one-host.json"


@pytest.fixture(scope="module")
def built(
    build_wheel: BuildWheel, pip: Pip, clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    return compile_wheel(
        ROOT / "plugins" / "customar_v2", build_wheel, pip, clean_environ, tmp_path_factory.mktemp("v2")
    )


@pytest.fixture(scope="module")
def installed(built: Built, build_wheel: BuildWheel, pip: Pip, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """A venv in which the plugin is installed by name from a folder like `dist`."""
    folder = tmp_path_factory.mktemp("installed")
    dist = folder / "dist"
    dist.mkdir()
    core = build_wheel(ROOT / "core")
    for wheel in (core, built.wheel):
        (dist / wheel.name).symlink_to(wheel)
    fresh = Venv(folder, [*(read_metadata(core).requires or []), "apache-tvm-ffi", "cuda-bindings", "numpy"])
    pip("--python", fresh.python, "install", "--no-index", "--find-links", dist, "comm-plugin-customar-v2")
    return fresh


@pytest.fixture
def no_compiler(installed: Venv, clean_environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment with only the venv on PATH, without nvcc and with a C++ compiler that fails."""
    return {
        **clean_environ,
        "PATH": str(installed.folder / "bin"),
        "CUDA_HOME": str(tmp_path),
        "CXX": "false",
        "COMM_CORE_CACHE_DIR": str(tmp_path / "cache"),
    }


def test_no_kernel_spills(built: Built) -> None:
    entries = KERNEL_ENTRY.findall(built.log)
    assert {(*kind_of(name), arch) for name, arch, _, _ in entries} == {
        # The norm after a plain all-reduce runs on one device, so it has no world size.
        *(("add_norm", 1, arch) for arch in ARCHITECTURES),
        *itertools.product((*ALGORITHMS, *FUSED), range(2, 9), ARCHITECTURES),
    }
    assert [entry for entry in entries if entry[2:] != ("0", "0")] == []


def test_nvcc_warns_of_nothing(built: Built) -> None:
    assert [line for line in built.log.splitlines() if "warning" in line.lower()] == []


def kind_of(name: str) -> tuple[str, int]:
    """Return a kernel's algorithm and world size (1 without one) from its mangled name."""
    found = re.search(r"\d((?:one|two)shot_[a-z_]+?|add_norm)IN9comm_core\w*?E(?:Li(\d)E|E)", name)
    assert found is not None, name
    return found[1], int(found[2] or 1)


def test_its_files(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        files = {name.removeprefix("comm_plugin_customar_v2/") for name in archive.namelist()}
    assert {
        "_lib/comm_plugin_customar_v2.so",
        "csrc/world2.cu",
        "csrc/tail.cuh",
        "csrc/add_norm.cuh",
        "py.typed",
    } <= files
    assert not built.wheel.name.endswith("-any.whl")


def test_installed_by_name_it_brings_core_and_works_without_a_compiler(
    installed: Venv, no_compiler: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [installed.python, "-c", LOAD], cwd=tmp_path, env=no_compiler, capture_output=True, text=True, check=False
    )
    # The "separate" norm adds one.
    assert (done.stdout, done.returncode) == (f"None {len(ALGORITHMS)} {len(FUSED) + 1}\n", 0), done.stderr
    assert not (tmp_path / "cache").exists()


def test_without_cuda_explain_gives_that_reason(installed: Venv, no_compiler: dict[str, str], tmp_path: Path) -> None:
    command = [installed.folder / "bin" / "comm-core", "explain", "--json", "--topology", TOPOLOGY]
    done = subprocess.run(command, cwd=tmp_path, env=no_compiler, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    candidates = {item["name"]: item for item in json.loads(done.stdout)["decision"]["candidates"]}
    assert candidates["customar_v2"]["reason"] == "it sums CUDA tensors, and this group has none"
