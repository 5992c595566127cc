"""The wheels with native code, built as `make wheels` builds them: no kernel spills, and they need no compiler."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from wheelhouse import ARCHITECTURES, KERNEL_ENTRY, PROJECTS, ROOT, BuildWheel, Built, Pip, Venv, module_of

# A compiler's minutes, on a busy machine.
pytestmark = pytest.mark.timeout(900)

NATIVE = [project for project in PROJECTS if [*ROOT.glob(f"{project}/src/*/csrc/*.c[up]*")]]
CUDA = [project for project in NATIVE if [*ROOT.glob(f"{project}/src/*/csrc/*.cu")]]
SM = tuple(f"sm_{number}" for number in ARCHITECTURES)

# A kernel's algorithm and number of ranks (none if it has no ranks) in its mangled name, and all that must be there.
KERNELS = {
    "plugins/customar_v1": (
        r"\d(one_stage|two_stage|write_test_pages|read_test_pages)(?:IN9comm_core\w*?ELi(\d)E)?",
        {
            *itertools.product(("one_stage", "two_stage"), "2468"),
            *itertools.product(("write_test_pages", "read_test_pages"), [None]),
        },
    ),
    "plugins/customar_v2": (
        r"\d((?:one|two)shot_[a-z_]+?(?:_fp8)?|padded_push(?:_norm)?|add_norm)IN9comm_core\w*?E(?:Li(\d)E|E)",
        {
            *itertools.product(("oneshot_push", "oneshot_stream", "twoshot_push"), "2345678"),
            *itertools.product(("oneshot_push_norm", "twoshot_push_norm"), "2345678"),
            *itertools.product(["twoshot_push_fp8"], "345678"),
            *itertools.product(("padded_push", "padded_push_norm"), "248"),
            ("oneshot_push_fp8", "2"),
            ("add_norm", None),
        },
    ),
}

LOAD = """
import json, sys
from comm_core.kernels import Library
libraries = {name: Library(name) for name in sys.argv[1:]}
missing = {name: library.missing() for name, library in libraries.items()}
loaded = {name: library.load() for name, library in libraries.items()}
numbers = [list(loaded[name].constants()) for name in ("comm_plugin_customar_v2",)]
functions = [callable(getattr(loaded["comm_bench"], name)) for name in ("launch", "hop", "transfer")]
print(json.dumps([missing, numbers, functions]))
"""

# Two ranks without a CUDA device.
TOPOLOGY = ROOT / "core" / "src" / "comm_core" / "_topologies" / "cpus-one-host.json"


@pytest.fixture(scope="module")
def installed(
    compiled: Callable[[str], Built], build_wheel: BuildWheel, pip: Pip, tmp_path_factory: pytest.TempPathFactory
) -> Venv:
    """A venv in which all these wheels are installed by name from a folder like `dist`."""
    folder = tmp_path_factory.mktemp("installed")
    dist = folder / "dist"
    dist.mkdir()
    for wheel in (build_wheel(ROOT / "core"), *(compiled(project).wheel for project in NATIVE)):
        (dist / wheel.name).symlink_to(wheel)
    names = [module_of(project).replace("_", "-") for project in NATIVE]
    fresh = Venv(folder, names)
    pip("--python", fresh.python, "install", "--no-index", "--find-links", dist, *names)
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


@pytest.mark.parametrize("project", CUDA)
def test_no_kernel_spills_on_any_architecture_and_nvcc_warns_of_nothing(
    project: str, compiled: Callable[[str], Built]
) -> None:
    log = compiled(project).log
    entries = KERNEL_ENTRY.findall(log)
    assert {architecture for _, architecture, _, _ in entries} == set(SM)
    assert [entry for entry in entries if entry[2:] != ("0", "0")] == []
    assert [line for line in log.splitlines() if "warning" in line.lower()] == []
    if project in KERNELS:
        pattern, expected = KERNELS[project]
        kinds = {(re.search(pattern, name), architecture) for name, architecture, _, _ in entries}
        assert {(kind and kind.groups(), architecture) for kind, architecture in kinds} == {
            *itertools.product(expected, SM)
        }


@pytest.mark.parametrize("project", NATIVE)
def test_the_binary_is_all_that_a_wheel_has_beside_the_sources(
    project: str, compiled: Callable[[str], Built], build_wheel: BuildWheel
) -> None:
    wheel, module = compiled(project).wheel, module_of(project)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(build_wheel(ROOT / project)) as plain:
        assert {*ours.namelist()} - {*plain.namelist()} == {f"{module}/_lib/{module}.so"}
        assert {*plain.namelist()} <= {*ours.namelist()}
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


def test_installed_by_name_they_bring_core_and_work_without_a_compiler(
    installed: Venv, no_compiler: dict[str, str], tmp_path: Path
) -> None:
    modules = [module_of(project) for project in NATIVE]
    command = [installed.python, "-c", LOAD, *modules]
    done = subprocess.run(command, cwd=tmp_path, env=no_compiler, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # customar_v2 has 5 algorithms and 3 norms: the "separate" norm, and those of the fused kernels.
    assert json.loads(done.stdout) == [dict.fromkeys(modules), [[5, 3]], [True, True, True]]
    assert not (tmp_path / "cache").exists()


def test_without_cuda_explain_gives_that_reason(installed: Venv, no_compiler: dict[str, str], tmp_path: Path) -> None:
    command = [installed.folder / "bin" / "comm-core", "explain", "--json", "--topology", TOPOLOGY]
    done = subprocess.run(command, cwd=tmp_path, env=no_compiler, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    candidates = {item["name"]: item for item in json.loads(done.stdout)["decision"]["candidates"]}
    for name in ("customar_v1", "customar_v2"):
        assert candidates[name]["reason"] == "it sums CUDA tensors, and this group has none"
