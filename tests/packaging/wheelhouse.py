"""Helpers of the packaging tests: list the projects, build and read wheels, make virtual environments."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from compilers import unoptimized
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Every distribution that is uploaded, by its folder.
PLUGINS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("plugins/*/pyproject.toml"))
INTEGRATIONS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("integrations/*/pyproject.toml"))
PROJECTS = ["core", "bench", *PLUGINS, *INTEGRATIONS]

Pip = Callable[..., str]
BuildWheel = Callable[[Path], Path]

# In the assembler's log: a kernel, its architecture, and its bytes of stack frame and of spill stores.
KERNEL_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", re.DOTALL
)

# Imports torch once. Then runs, for each line with JSON of an output file and arguments, `comm-core` in a fork of this
# process, which sees the distributions that are installed by then.
SERVE_COMMANDS = """
import importlib, json, os, runpy, sys, traceback
import torch

for line in sys.stdin:
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    output, *sys.argv[1:] = json.loads(line)
    sys.stdout = sys.stderr = open(output, "w")
    importlib.invalidate_caches()
    status = 1
    try:
        runpy.run_module("comm_core", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)
"""


# The compute capabilities that wheels are compiled for. Each takes minutes of the 20 that CI has, so all three are
# compiled only with SOAK_KERNELS=1.
ARCHITECTURES = ("80", "90", "100") if os.environ.get("SOAK_KERNELS") else ("90",)


class Built(NamedTuple):
    wheel: Path
    log: str  # nvcc's


def module_of(project: str) -> str:
    return f"comm_plugin_{Path(project).name}" if project in PLUGINS else f"comm_{Path(project).name}"


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Call `make` with an empty folder, and move it to `folder`; pytest's other processes wait and share the result."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
            make(scratch)
            scratch.rename(folder)
    return folder


def compile_wheel(project: Path, core_wheel: Path, pip: Pip, clean_environ: dict[str, str], folder: Path) -> None:
    """Build a project's wheel as `make wheels` does, with an nvcc that makes the assembler report on each kernel.

    Kernels are optimised, the host's code isn't.
    Skips the test without nvcc. In `folder`, which must be empty, `dist` gets the wheel and `logs` nvcc's output.
    """
    search = os.pathsep.join([f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None:
        pytest.skip("there is no nvcc on this machine")
    for name in ("bin", "logs", "dist"):
        (folder / name).mkdir()
    wrapper = folder / "bin" / "nvcc"
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && exec printf "compute_%s\\n" {" ".join(ARCHITECTURES)}\n'
        f'exec "{nvcc}" "$@" -Xptxas=-v 2>"{folder}/logs/$$"\n'
    )
    wrapper.chmod(0o755)
    # Core from its wheel, with the build hook and the headers.
    pip("install", "--target", folder / "core", "--no-deps", "--no-index", core_wheel)
    chosen = {
        "CUDA_HOME": str(folder),
        "CXX": str(unoptimized(folder / "bin")),
        "HATCH_BUILD_HOOKS_ENABLE": "1",
        "PYTHONPATH": str(folder / "core"),
    }
    pip(
        *("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist"),
        project,
        environ={**clean_environ, **chosen},
    )


def read_metadata(wheel: Path) -> PathDistribution:
    (folder,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder)


def entry_points(wheel: Path, group: str) -> list[EntryPoint]:
    return [entry for entry in read_metadata(wheel).entry_points if entry.group == group]


class Venv:
    """A virtual environment in `folder` that doesn't see this checkout.

    Packages such as torch are too large to install again, so `requirements` and their dependencies are linked from this
    interpreter's environment. The others stay out, because pip and entry points would see the checkout's editable
    installs; those are looked through for their dependencies, and not linked.
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

    def files(self) -> set[Path]:
        """Return all files and folders of the environment."""
        return {path.relative_to(self.folder) for path in self.folder.rglob("*")}


class Commands:
    """Runs `comm-core` with the distributions of a venv, and imports torch only once for all runs."""

    def __init__(self, venv: Venv, environ: dict[str, str], folder: Path) -> None:
        self._output = folder / "output"
        self._process = subprocess.Popen(
            [venv.python, "-c", SERVE_COMMANDS],
            cwd=folder,
            env={name: value for name, value in environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Return the exit status and what was printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self._output), *arguments]) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return status, self._output.read_text()

    def plugins(self, kind: str = "plugins") -> dict[str, dict[str, Any]]:
        """Return the plugins, or "integrations", of `comm-core doctor`, by name."""
        _, text = self.run("doctor", "--json")
        return {line["name"]: line for line in json.loads(text)[kind]}

    def close(self) -> None:
        self._process.communicate()


def paths_of_dependencies(requirements: Iterable[str]) -> Iterable[Path]:
    """Return the files and folders of `requirements` and their dependencies in this interpreter's site-packages.

    Raises:
        PackageNotFoundError: one isn't installed.
    """
    found: dict[Path, None] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        needed = [Requirement(text) for text in distribution.requires or []]
        waiting += [
            item for item in needed if not item.marker or any(item.marker.evaluate({"extra": x}) for x in ("", *extras))
        ]
        if name.startswith("comm-"):
            continue  # this checkout's
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        found.update(dict.fromkeys(Path(str(distribution.locate_file(top))) for top in tops))
    return found


def missing_dependency(project: str) -> str | None:
    """Return the name of a distribution that a project needs and this interpreter lacks; None if it has all."""
    try:
        paths_of_dependencies([module_of(project).replace("_", "-")])
    except importlib.metadata.PackageNotFoundError as error:
        return error.name
    return None
