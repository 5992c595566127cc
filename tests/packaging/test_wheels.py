"""The contents and the metadata of the wheels, and the packages that the development root installs."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from wheelhouse import PLUGINS, PROJECTS, ROOT, BuildWheel, Pip, entry_points, module_of, read_metadata

CORE_VERSION = Version(re.findall(r'"(.+)"', (ROOT / "core/src/comm_core/_version.py").read_text())[-1])


def beside(project: str) -> list[str]:
    """The packages beside a project's package."""
    return ["_comm_core_torch"] if project == "core" else []


@pytest.mark.parametrize("project", PROJECTS)
def test_wheel_has_its_package_and_nothing_else(project: str, build_wheel: BuildWheel) -> None:
    wheel, module, source = build_wheel(ROOT / project), module_of(project), ROOT / project / "src"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    described = {name for name in names if name.startswith(f"{info}/")}
    assert described == {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    # The source folder may have caches; a wheel must not.
    sources = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    sources = {name for name in sources if not name.endswith((".pyc", ".so"))}
    assert names - described == sources
    assert {name.partition("/")[0] for name in sources} == {module, *beside(project)}
    assert f"{module}/py.typed" in sources
    assert not [name for name in sources if re.search(r"(^|/)(tests/|test_|conftest)", name)]


@pytest.mark.parametrize("project", PROJECTS)
def test_metadata(project: str, build_wheel: BuildWheel) -> None:
    wheel, module = build_wheel(ROOT / project), module_of(project)
    found = read_metadata(wheel)
    assert found.metadata["Name"] == module.replace("_", "-")
    assert found.metadata["Requires-Python"] == ">=3.10"
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert Version(found.version).release
    on_core = [item for item in map(Requirement, found.requires or []) if item.name == "comm-core"]
    if project == "core":
        assert (Version(found.version), on_core) == (CORE_VERSION, [])
        return
    (requirement,) = on_core
    # From this minor version of core to before the next one, which may break plugins.
    assert CORE_VERSION in requirement.specifier
    major, minor, _ = CORE_VERSION.release
    assert [*requirement.specifier.filter(["0", f"{major}.{minor + 1}", f"{major + 1}.0"])] == []


@pytest.mark.parametrize("project", PROJECTS)
def test_entry_points_are_this_projects_own(project: str, build_wheel: BuildWheel) -> None:
    wheel = build_wheel(ROOT / project)
    module, backends = module_of(project), entry_points(wheel, "comm_core.backends")
    # Jupyter owns the name `comm`, also as a script.
    scripts = {"comm-core": "comm_core.cli:main"} if project == "core" else {}
    assert {entry.name: entry.value for entry in entry_points(wheel, "console_scripts")} == scripts
    assert {entry.name: entry.value for entry in backends} == (
        {Path(project).name: module} if project in PLUGINS else {}
    )
    points = read_metadata(wheel).entry_points
    assert points
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for entry in points:
        path = entry.module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & names, entry
        assert path.partition("/")[0] in {module, *beside(project)}


def test_core_wheel_has_the_data_of_its_commands(build_wheel: BuildWheel) -> None:
    with zipfile.ZipFile(build_wheel(ROOT / "core")) as archive:
        names = set(archive.namelist())
    suffixes = {"_template": ".template", "_topologies": ".json", "include/comm_core": ".cuh"}
    for folder, suffix in suffixes.items():
        assert [name for name in names if name.startswith(f"comm_core/{folder}/") and name.endswith(suffix)]


def test_the_benchmark_is_only_in_its_own_wheel(build_wheel: BuildWheel) -> None:
    core, bench = (build_wheel(ROOT / project) for project in ("core", "bench"))
    with zipfile.ZipFile(core) as archive:
        assert [name for name in archive.namelist() if "bench" in name or "csrc" in name] == []
    with zipfile.ZipFile(bench) as archive:
        assert {"comm_bench/schema.json", "comm_bench/csrc/limits.cu", "comm_bench/cli.py"} <= set(archive.namelist())
    assert [(entry.name, entry.value) for entry in entry_points(bench, "comm_core.commands")] == [
        ("bench", "comm_bench.cli"),
        ("tune", "comm_bench.tune"),
    ]
    assert entry_points(core, "comm_core.commands") == []
    extras = {path: read_metadata(path).metadata.get_all("Provides-Extra") for path in (core, bench)}
    assert extras == {core: ["completion", "kernels", "memory", "prometheus", "testing"], bench: ["plot"]}


@pytest.mark.parametrize("project", PROJECTS)
def test_a_projects_file_has_no_settings_of_other_tools(project: str) -> None:
    text = (ROOT / project / "pyproject.toml").read_text()
    tools = set(re.findall(r"^\[+tool\.([\w-]+)", text, flags=re.MULTILINE))
    assert tools <= {"hatch", "setuptools", "scikit-build"}, (
        "settings of other tools belong in the root's pyproject.toml"
    )


def test_root_installs_core_and_its_benchmark_and_names_every_plugin(pip: Pip) -> None:
    # torch is installed already. Without an index, pip fails on any other package that isn't in this checkout.
    report = json.loads(
        pip("install", "--dry-run", "--no-index", "--no-build-isolation", "--quiet", "--report", "-", ROOT)
    )
    installs = {item["metadata"]["name"]: item for item in report["install"]}
    for project in ("core", "bench"):
        assert installs[f"comm-{project}"]["download_info"]["url"] == (ROOT / project).as_uri()
    required = installs["comm-workspace"]["metadata"]["requires_dist"]
    for project in PROJECTS:
        assert any((ROOT / project).as_uri() in line for line in required), f"pyproject.toml doesn't name {project}"


def test_root_ships_no_code(build_wheel: BuildWheel) -> None:
    with zipfile.ZipFile(build_wheel(ROOT)) as archive:
        assert [name for name in archive.namelist() if ".dist-info/" not in name] == []
