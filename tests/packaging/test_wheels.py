"""The contents of the wheels, and the packages that the development root installs."""

from __future__ import annotations

import json
import re
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path, PurePosixPath

import pytest
from wheelhouse import ROOT, BuildWheel, Pip, read_metadata

PLUGINS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("plugins/*/pyproject.toml"))
PROJECTS = ["core", "bench", *PLUGINS]


def module_of(project: str) -> str:
    return f"comm_{project}" if project not in PLUGINS else f"comm_plugin_{Path(project).name}"


def entry_points(wheel: Path, group: str) -> list[EntryPoint]:
    return [entry for entry in read_metadata(wheel).entry_points if entry.group == group]


@pytest.mark.parametrize("project", PROJECTS)
def test_wheel_has_one_typed_package_and_its_licence(project: str, build_wheel: BuildWheel) -> None:
    wheel, module = build_wheel(ROOT / project), module_of(project)
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
        (licence,) = (name for name in names if name.match("*.dist-info/licenses/LICENSE"))
        assert archive.read(str(licence)) == (ROOT / "LICENSE").read_bytes()
    top_level = {name.parts[0] for name in names}
    assert top_level == {module, licence.parts[0]}
    assert PurePosixPath(module, "py.typed") in names
    assert not [name for name in names if "tests" in name.parts or name.name.startswith(("test_", "conftest"))]


def test_core_wheel_has_its_script_and_no_backend(build_wheel: BuildWheel) -> None:
    wheel = build_wheel(ROOT / "core")
    assert [(entry.name, entry.value) for entry in entry_points(wheel, "console_scripts")] == [
        ("comm-core", "comm_core.cli:main")
    ]
    assert entry_points(wheel, "comm_core.backends") == []
    assert entry_points(wheel, "comm_core.commands") == []


def test_core_wheel_has_the_data_of_its_commands(build_wheel: BuildWheel) -> None:
    source = ROOT / "core" / "src"
    files = [*source.glob("comm_core/_template/**/*.template"), *source.glob("comm_core/_topologies/*.json")]
    assert {path.suffix for path in files} == {".template", ".json"}
    with zipfile.ZipFile(build_wheel(ROOT / "core")) as archive:
        assert {path.relative_to(source).as_posix() for path in files} <= set(archive.namelist())


def test_the_benchmark_is_only_in_its_own_wheel(build_wheel: BuildWheel) -> None:
    core, bench = (build_wheel(ROOT / project) for project in ("core", "bench"))
    with zipfile.ZipFile(core) as archive:
        assert [name for name in archive.namelist() if "bench" in name or "csrc" in name] == []
    with zipfile.ZipFile(bench) as archive:
        assert {"comm_bench/schema.json", "comm_bench/csrc/limits.cu", "comm_bench/cli.py"} <= set(archive.namelist())
    assert [(entry.name, entry.value) for entry in entry_points(bench, "comm_core.commands")] == [
        ("bench", "comm_bench.cli")
    ]
    extras = {path: read_metadata(path).metadata.get_all("Provides-Extra") for path in (core, bench)}
    assert extras == {core: ["kernels", "memory", "testing"], bench: ["plot"]}


@pytest.mark.parametrize("project", PROJECTS)
def test_names_are_this_projects_own(project: str, build_wheel: BuildWheel) -> None:
    wheel = build_wheel(ROOT / project)
    assert read_metadata(wheel).metadata["Name"] == module_of(project).replace("_", "-")
    # Jupyter owns the name `comm`.
    assert "comm" not in [entry.name for entry in entry_points(wheel, "console_scripts")]
    backends = [entry.name for entry in entry_points(wheel, "comm_core.backends")]
    assert backends == ([Path(project).name] if project in PLUGINS else [])


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
