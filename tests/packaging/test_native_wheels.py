"""Plugins with native code: the build hook's wheels, which work without a compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from wheelhouse import ROOT, BuildWheel, Pip, read_metadata

PROJECT = """
[build-system]
requires = ["hatchling", "comm-core[kernels]"]
build-backend = "hatchling.build"

[project]
name = "comm-plugin-native"
version = "1"
requires-python = ">=3.10"

[tool.hatch.build.hooks.comm-core]
"""

ADD_CPP = """
#include <tvm/ffi/function.h>
static int64_t add(int64_t a, int64_t b) { return a + b; }
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add, add);
"""

# Calls hatchling's build functions as a build front end does.
BUILD = "import sys, hatchling.build; print(getattr(hatchling.build, sys.argv[1])(sys.argv[2]))"

LOAD = """
from comm_core.kernels import Library
library = Library("comm_plugin_native")
print(library.missing(), library.load().add(2, 3))
"""

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def core(build_wheel: BuildWheel, pip: Pip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with core's wheel installed, and a fake torch that ends the process if it is imported."""
    folder = tmp_path_factory.mktemp("core")
    pip("install", "--target", folder, "--no-deps", "--no-index", build_wheel(ROOT / "core"))
    (folder / "torch.py").write_text("raise SystemExit('torch was imported')")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    package = folder / "src" / "comm_plugin_native"
    (package / "csrc").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / ".gitignore").write_text("*.so\n")
    (package / "__init__.py").touch()
    (package / "csrc" / "add.cpp").write_text(ADD_CPP)
    (package / "csrc" / "unused.h").touch()
    return folder


@pytest.fixture
def run(core: Path, clean_environ: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs this interpreter with core installed; keyword arguments set environment variables."""

    def call(*arguments: str | Path, cwd: Path = tmp_path, **environ: str) -> subprocess.CompletedProcess[str]:
        here = {"PYTHONPATH": str(core), "COMM_CORE_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env={**clean_environ, **here, **environ}, capture_output=True, text=True, check=False
        )

    return call


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """Environment variables without a compiler."""
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "CXX": ""}


@pytest.fixture
def build(project: Path, tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> Build:
    """A function that builds the project's wheel or source distribution and returns its path."""

    def call(what: str, **environ: str) -> Path:
        done = run("-c", BUILD, what, tmp_path / "dist", cwd=project, **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        (tmp_path / "stderr").write_text(done.stderr)
        return tmp_path / "dist" / done.stdout.split()[-1]

    return call


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name.removeprefix("comm_plugin_native/") for name in archive.namelist() if ".dist-info/" not in name}


SOURCES = {"__init__.py", "csrc/add.cpp", "csrc/unused.h"}


def test_a_wheel_with_its_binary_works_without_a_compiler(
    build: Build,
    pip: Pip,
    run: Callable[..., subprocess.CompletedProcess[str]],
    core: Path,
    no_compiler: dict[str, str],
    tmp_path: Path,
) -> None:
    wheel = build("build_wheel")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"comm_plugin_native-1-py3-none-{platform}.whl"
    assert files(wheel) == SOURCES | {"_lib/comm_plugin_native.so"}
    described = read_metadata(wheel).read_text("WHEEL")
    assert described is not None
    assert "Root-Is-Purelib: false" in described

    site = tmp_path / "site"
    pip("install", "--target", site, "--no-deps", "--no-index", wheel)
    (site / "torch.py").write_text("raise ImportError('not in this test')")
    done = run("-c", LOAD, PYTHONPATH=f"{site}:{core}", **no_compiler)
    assert (done.stdout, done.returncode) == ("None 5\n", 0), done.stderr
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_the_wheel_is_pure_and_says_so(
    build: Build, no_compiler: dict[str, str], tmp_path: Path
) -> None:
    wheel = build("build_wheel", **no_compiler)
    assert wheel.name == "comm_plugin_native-1-py3-none-any.whl"
    assert files(wheel) == SOURCES
    assert "comm-plugin-native: this wheel has only sources: " in (tmp_path / "stderr").read_text()
    assert "the C++ compiler 'c++' isn't on PATH" in (tmp_path / "stderr").read_text()


def test_an_editable_install_compiles_nothing(build: Build) -> None:
    # A compiler that always fails, so the build fails if it calls it.
    assert build("build_editable", CXX="false").name.endswith("-py3-none-any.whl")


def test_a_source_distribution_compiles_nothing_and_has_the_sources(build: Build) -> None:
    archive = build("build_sdist", CXX="false")
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    assert [name for name in names if name.endswith("src/comm_plugin_native/csrc/add.cpp")]
    assert not [name for name in names if name.endswith(".so")]


def test_a_compiler_that_fails_fails_the_build(
    project: Path, tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (project / "src" / "comm_plugin_native" / "csrc" / "add.cpp").write_text("#error this isn't code")
    done = run("-c", BUILD, "build_wheel", tmp_path / "dist", cwd=project)
    assert done.returncode == 1
    assert "this isn't code" in done.stderr


def test_the_package_can_be_named_and_lie_beside_the_project_file(
    project: Path, build: Build, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    text = PROJECT.replace("comm-plugin-native", "other-name")
    (project / "pyproject.toml").write_text(text)
    done = run("-c", BUILD, "build_wheel", tmp_path / "dist", cwd=project)
    assert "there is no package 'other_name'" in done.stderr
    assert "Set package in [tool.hatch.build.hooks.comm-core] to its name" in done.stderr

    shutil.move(project / "src" / "comm_plugin_native", project / "comm_plugin_native")
    wheel = '\n[tool.hatch.build.targets.wheel]\npackages = ["comm_plugin_native"]\n'
    (project / "pyproject.toml").write_text(f'{text}package = "comm_plugin_native"\n{wheel}')
    assert "_lib/comm_plugin_native.so" in files(build("build_wheel"))
