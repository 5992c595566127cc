"""Fixtures that build wheels with pip, in an environment without this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from wheelhouse import PROJECTS, ROOT, BuildWheel, Built, Pip, compile_wheel, make_once, module_of


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """This process's environment without the variables that could put this checkout on another interpreter's path."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("COMM_CORE_")}


@pytest.fixture(scope="session")
def pip(clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Pip:
    """A function that runs pip outside the checkout and returns its stdout.

    Its argument `environ` replaces the clean environment.
    """
    elsewhere = tmp_path_factory.mktemp("pip")

    def run(*arguments: str | Path, environ: dict[str, str] | None = None) -> str:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=elsewhere, env=environ or clean_environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of pytest's worker processes share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "packaging"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def wheels(pip: Pip, shared: Path) -> Path:
    """A folder with the wheels of all projects and of the root, without compiled kernels."""
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    return make_once(shared / "wheels", lambda folder: pip(*build, folder, ROOT, *(ROOT / name for name in PROJECTS)))


@pytest.fixture(scope="session")
def build_wheel(pip: Pip, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildWheel:
    """A function that returns the wheel of a project, also of a test's own; each is built once."""
    built = {ROOT / project: next(wheels.glob(f"{module_of(project)}-*.whl")) for project in PROJECTS}
    built[ROOT] = next(wheels.glob("comm_workspace-*.whl"))

    def build(source: Path) -> Path:
        if source not in built:
            folder = tmp_path_factory.mktemp("wheel")
            pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
            (built[source],) = folder.glob("*.whl")
        return built[source]

    return build


@pytest.fixture(scope="session")
def compiled(build_wheel: BuildWheel, pip: Pip, clean_environ: dict[str, str], shared: Path) -> Callable[[str], Built]:
    """A function that returns the wheel of a project with its kernels, and nvcc's log; each is compiled once."""

    def build(project: str) -> Built:
        def make(folder: Path) -> None:
            compile_wheel(ROOT / project, build_wheel(ROOT / "core"), pip, clean_environ, folder)

        folder = make_once(shared / module_of(project), make)
        (wheel,) = (folder / "dist").glob("*.whl")
        return Built(wheel, "\n".join(path.read_text() for path in sorted((folder / "logs").iterdir())))

    return build
