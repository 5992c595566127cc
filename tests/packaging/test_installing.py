"""Each wheel installs alone beside core's, is found, and leaves nothing behind; plugins for other cores are refused."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from wheelhouse import (
    INTEGRATIONS,
    PROJECTS,
    ROOT,
    BuildWheel,
    Commands,
    Pip,
    Venv,
    entry_points,
    missing_dependency,
    module_of,
    read_metadata,
)

MODULE = """
import comm_core

COMM_HOOK_API = {api}


@comm_core.hookimpl
def all_reduce(session, tensor, out):
    return tensor
"""


@pytest.fixture(scope="module")
def venv(wheels: Path, pip: Pip, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """A venv with core, and with the dependencies of all projects but not these; each test leaves it as it was."""
    names = [name_of(project) for project in PROJECTS if not missing_dependency(project)]
    fresh = Venv(tmp_path_factory.mktemp("fresh"), names)
    install(fresh, pip, wheels, "comm-core")
    return fresh


@pytest.fixture(scope="module")
def commands(venv: Venv, clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(venv, clean_environ, tmp_path_factory.mktemp("commands"))
    yield running
    running.close()


def name_of(project: str) -> str:
    return module_of(project).replace("_", "-")


def install(venv: Venv, pip: Pip, links: Path, *arguments: str) -> None:
    pip("--python", venv.python, "install", "--no-index", "--find-links", links, *arguments)


def uninstall(venv: Venv, pip: Pip, *names: str) -> None:
    pip("--python", venv.python, "uninstall", "--yes", *names)


def of_core(files: set[Path]) -> set[Path]:
    return {path for path in files if re.search(r"comm[_-]core", str(path))}


@pytest.mark.parametrize("project", [project for project in PROJECTS if project != "core"])
def test_a_wheel_installs_alone_beside_core_is_found_and_leaves_nothing_behind(
    project: str,
    venv: Venv,
    commands: Commands,
    wheels: Path,
    build_wheel: BuildWheel,
    pip: Pip,
) -> None:
    before, missing = venv.files(), missing_dependency(project)
    # Compiled by the imports below instead of pip, as for a user who changes Python's options. Without its library a
    # plugin can be installed only as `make setup` does it.
    install(venv, pip, wheels, "--no-compile", *(["--no-deps"] if missing else []), name_of(project))
    wheel = build_wheel(ROOT / project)
    backends = {entry.name for entry in entry_points(wheel, "comm_core.backends")}
    listed = commands.plugins()
    assert {name: line["usable"] for name, line in listed.items()} == dict.fromkeys(backends, True), listed
    for line in listed.values():
        assert (line["distribution"], line["version"]) == (name_of(project), read_metadata(wheel).version)
        if missing:
            assert f"isn't installed: pip install '{missing}" in line["facts"]["missing"]
    integrations = commands.plugins("integrations")
    assert {name: line["distribution"] for name, line in integrations.items()} == (
        {Path(project).name: name_of(project)} if project in INTEGRATIONS else {}
    )
    assert all(line["usable"] and line["facts"]["installed"] == {} for line in integrations.values())
    for entry in entry_points(wheel, "comm_core.commands"):
        status, printed = commands.run(entry.name, "--help")
        assert (status, f"usage: comm-core {entry.name}" in printed) == (0, True), printed
    assert [*(venv.site_packages / module_of(project) / "__pycache__").iterdir()]

    uninstall(venv, pip, name_of(project))
    assert venv.files() == before
    assert commands.plugins() == {}


def test_core_leaves_nothing_behind_and_takes_nothing_of_a_plugin(
    venv: Venv, commands: Commands, wheels: Path, pip: Pip
) -> None:
    before = venv.files()
    install(venv, pip, wheels, "comm-plugin-shm")
    both = venv.files()
    uninstall(venv, pip, "comm-core")
    assert of_core(both)
    assert venv.files() == both - of_core(both)
    install(venv, pip, wheels, "comm-core")
    assert commands.plugins()["shm"]["usable"]
    uninstall(venv, pip, "comm-plugin-shm")
    assert venv.files() == before


def tiny_wheel(folder: Path, name: str, version: str, requires: str, api: tuple[int, int] = (1, 0)) -> None:
    """Write the wheel of a plugin `name` with one module."""
    info = f"comm_plugin_{name}-{version}.dist-info"
    files = {
        f"comm_plugin_{name}.py": MODULE.format(api=api),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: comm-plugin-{name}\nVersion: {version}\n"
        f"Requires-Dist: comm-core{requires}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[comm_core.backends]\n{name} = comm_plugin_{name}\n",
    }
    write_wheel(folder / f"comm_plugin_{name}-{version}-py3-none-any.whl", info, files)


def next_core(folder: Path, wheel: Path, version: str, following: str) -> None:
    """Write core's wheel once more, as the release `following`."""
    info = f"comm_core-{following}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if not name.endswith("/RECORD")}
    for name in (f"comm_core-{version}.dist-info/METADATA", "comm_core/_version.py"):
        assert texts[name].count(version) == 1
        texts[name] = texts[name].replace(version, following)
    files = {name.replace(f"comm_core-{version}.dist-info", info): text for name, text in texts.items()}
    write_wheel(folder / f"comm_core-{following}-py3-none-any.whl", info, files)


def write_wheel(path: Path, info: str, files: dict[str, str]) -> None:
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)


def test_a_plugin_for_another_core_is_refused_alone_until_the_command_that_mends_it(
    venv: Venv,
    commands: Commands,
    build_wheel: BuildWheel,
    pip: Pip,
    clean_environ: dict[str, str],
    tmp_path: Path,
) -> None:
    before = venv.files()
    core = build_wheel(ROOT / "core")
    version = read_metadata(core).version
    following = f"{version}.post1"
    first, later = tmp_path / "first", tmp_path / "later"
    for folder in (first, later):
        folder.mkdir()
    tiny_wheel(first, "good", "1.0", f"=={version}.*")
    tiny_wheel(first, "newer", "1.0", f">={following}")
    tiny_wheel(first, "older", "1.0", f"<{version}")
    tiny_wheel(first, "hooks", "1.0", "", api=(2, 0))
    # By now there are also these releases.
    tiny_wheel(later, "older", "1.1", f">={version}")
    tiny_wheel(later, "hooks", "1.1", "")
    next_core(later, core, version, following)

    # As after an upgrade of core alone, which pip lets pass with a warning.
    names = [f"comm-plugin-{name}" for name in ("good", "newer", "older", "hooks")]
    install(venv, pip, first, "--no-deps", *names)
    reasons = {
        "newer": f"it requires 'comm-core>={following}', and comm-core {version} is running",
        "older": f"it requires 'comm-core<{version}', and comm-core {version} is running",
        "hooks": "it is written for version 2.0 of the hooks; this comm-core has 1.0",
    }
    found = commands.plugins()
    assert {name: line["reason"] for name, line in found.items() if not line["usable"]} == reasons
    assert found["good"]["usable"]
    environ = {**clean_environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": f"{first} {later}"}
    for name in reasons:
        command = f"pip install --upgrade comm-plugin-{name} comm-core"
        assert found[name]["remedy"].endswith(f": {command}")
        assert not commands.plugins()[name]["usable"]
        pip("--python", venv.python, *command.split()[1:], environ=environ)
        assert commands.plugins()[name]["usable"]
    assert {name for name, line in commands.plugins().items() if line["usable"]} == {"good", *reasons}

    uninstall(venv, pip, *names, "comm-core")
    install(venv, pip, core.parent, "comm-core")
    assert venv.files() == before
