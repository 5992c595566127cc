"""Fixtures that build wheels with pip, in an environment without this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from wheelhouse import BuildWheel, Pip


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
def build_wheel(pip: Pip, tmp_path_factory: pytest.TempPathFactory) -> BuildWheel:
    """A function that builds a project's wheel, once per session."""
    built: dict[Path, Path] = {}

    def build(source: Path) -> Path:
        if source not in built:
            folder = tmp_path_factory.mktemp("wheel")
            pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
            (built[source],) = folder.glob("*.whl")
        return built[source]

    return build
