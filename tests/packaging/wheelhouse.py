"""What the packaging tests share: where the checkout is, and how to look into a wheel."""

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

# A kernel, its architecture, and how many bytes of it are kept in the stack and spilt, in what the assembler says.
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", re.DOTALL
)


class Built(NamedTuple):
    wheel: Path
    said: str  # by nvcc


def compile_wheel(
    project: Path, build_wheel: BuildWheel, pip: Pip, clean_environ: dict[str, str], folder: Path
) -> Built:
    """Build a plugin's wheel as `make wheels` does, through an nvcc that asks the assembler to tell of each kernel.

    Skips where there is no nvcc. `folder` is an empty one.
    """
    search = os.pathsep.join([f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        pytest.skip("there is no nvcc on this machine")
    for name in ("bin", "said", "dist"):
        (folder / name).mkdir()
    wrapper = folder / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec "{nvcc}" "$@" -Xptxas=-v 2>"{folder}/said/$$"\n')
    wrapper.chmod(0o755)
    # Core as it is distributed: its build hook and its headers.
    pip("install", "--target", folder / "core", "--no-deps", "--no-index", build_wheel(ROOT / "core"))
    chosen = {"CUDA_HOME": str(folder), "HATCH_BUILD_HOOKS_ENABLE": "1", "PYTHONPATH": str(folder / "core")}
    pip(
        *("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist"),
        project,
        environ={**clean_environ, **chosen},
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    return Built(wheel, "\n".join(path.read_text() for path in sorted((folder / "said").iterdir())))


def read_metadata(wheel: Path) -> PathDistribution:
    (folder,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder)


class Venv:
    """A virtual environment without this checkout, in a folder of `folder`.

    Torch and the like are too large to install anew. What `requirements` name, and what that needs, is borrowed by
    links to it alone: to put all of this interpreter's packages on the path would make pip, and entry points, see the
    checkout's own editable installs.
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
    """The files and folders in this interpreter's site-packages that `requirements` and theirs consist of."""
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
