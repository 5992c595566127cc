"""Helpers of the packaging tests: build wheels with kernels, read wheels, make virtual environments."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

Pip = Callable[..., str]
BuildWheel = Callable[[Path], Path]

# In the assembler's log: a kernel, its architecture, and its bytes of stack frame and of spill stores.
KERNEL_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", re.DOTALL
)


class Built(NamedTuple):
    wheel: Path
    log: str  # nvcc's


def compile_wheel(
    project: Path, build_wheel: BuildWheel, pip: Pip, clean_environ: dict[str, str], folder: Path
) -> Built:
    """Build a project's wheel as `make wheels` does, with an nvcc that makes the assembler report on each kernel.

    Skips the test without nvcc. `folder` must be empty.
    """
    search = os.pathsep.join([f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        pytest.skip("there is no nvcc on this machine")
    for name in ("bin", "logs", "dist"):
        (folder / name).mkdir()
    wrapper = folder / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec "{nvcc}" "$@" -Xptxas=-v 2>"{folder}/logs/$$"\n')
    wrapper.chmod(0o755)
    # Core from its wheel, with the build hook and the headers.
    pip("install", "--target", folder / "core", "--no-deps", "--no-index", build_wheel(ROOT / "core"))
    chosen = {"CUDA_HOME": str(folder), "HATCH_BUILD_HOOKS_ENABLE": "1", "PYTHONPATH": str(folder / "core")}
    pip(
        *("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist"),
        project,
        environ={**clean_environ, **chosen},
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    return Built(wheel, "\n".join(path.read_text() for path in sorted((folder / "logs").iterdir())))


def read_metadata(wheel: Path) -> PathDistribution:
    (folder,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder)


class Venv:
    """A virtual environment in `folder` that doesn't see this checkout.

    Packages such as torch are too large to install again, so `requirements` and their dependencies are linked from this
    interpreter's environment. The others stay out, because pip and entry points would see the checkout's editable
    installs.
    """

    def __init__(self, folder: Path, requirements: Iterable[str]) -> None:
        self.folder = folder / "venv"
        self.python = self.folder / "bin" / "python"
        paths = sysconfig.get_paths("posix_prefix", vars={"base": str(self.folder), "platbase": str(self.folder)})
        self.site_packages = Path(paths["purelib"])
        venv.create(self.folder)
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for path in paths_of_dependencies(requirements):
            (borrowed / path.name).symlink_to(path)
        (self.site_packages / "borrowed.pth").write_text(f"{borrowed}\n")


def paths_of_dependencies(requirements: Iterable[str]) -> Iterable[Path]:
    """Return the files and folders of `requirements` and their dependencies in this interpreter's site-packages."""
    found: dict[Path, None] = {}
    seen: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        waiting += [Requirement(text) for text in distribution.requires or []]
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        found.update(dict.fromkeys(Path(str(distribution.locate_file(top))) for top in tops))
    return found
