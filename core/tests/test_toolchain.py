"""Which compilers are taken, with which flags, and what names the result."""

from __future__ import annotations

import dataclasses
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from comm_core import hookspecs, kernels
from comm_core._native import toolchain
from comm_core._native.toolchain import Recipe, Tools, find_sources, find_tools, gencode, make_recipe
from comm_core.errors import PluginLoadError

PTX_100 = "compute_100,code=compute_100"


@pytest.fixture
def programs(tmp_path: Path) -> Callable[..., str]:
    """Makes a folder with programs of these names, for PATH."""

    def make(*names: str) -> str:
        folder = tmp_path / "-".join(("bin", *names))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(stat.S_IRWXU)
        return str(folder)

    return make


def package(folder: Path, **files: str) -> Path:
    """A package whose csrc/ has these files; a name's underscore stands for its dot."""
    (folder / "csrc").mkdir(parents=True)
    for name, text in files.items():
        (folder / "csrc" / name.replace("_", ".")).write_text(text)
    return folder


def recipe(folder: Path) -> Recipe:
    sources = find_sources(folder)
    return make_recipe(folder.name, sources, find_tools(sources))


@pytest.mark.parametrize(
    ("capabilities", "supported", "flags"),
    [
        ((90,), (75, 80, 90, 100), ["compute_90,code=sm_90"]),
        ((80, 90), (75, 80, 90), ["compute_80,code=sm_80", "compute_90,code=sm_90"]),
        # A device that is newer than nvcc: the driver compiles PTX.
        ((103,), (80, 90, 100), [PTX_100]),
        ((90, 103), (80, 90), ["compute_90,code=sm_90", "compute_90,code=compute_90"]),
        # No device, so a wheel.
        (
            (),
            (75, 80, 90, 100, 120),
            [*(f"compute_{n},code=sm_{n}" for n in (80, 90, 100)), PTX_100],
        ),
        ((), (50, 80, 90), ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ((), (120,), ["compute_120,code=sm_120", "compute_120,code=compute_120"]),
    ],
)
def test_nvcc_generates_what_the_devices_run(
    capabilities: tuple[int, ...], supported: tuple[int, ...], flags: list[str]
) -> None:
    assert gencode(capabilities, supported) == tuple(f"-gencode=arch={flag}" for flag in flags)


@pytest.mark.parametrize(("capabilities", "supported"), [((70,), (75, 80)), ((90,), ()), ((), ())])
def test_devices_that_nvcc_no_longer_knows_are_an_error(
    capabilities: tuple[int, ...], supported: tuple[int, ...]
) -> None:
    with pytest.raises(PluginLoadError, match="this nvcc compiles for compute capabilities"):
        gencode(capabilities, supported)


def test_the_compiler_is_cxx_else_the_systems(programs: Callable[..., str]) -> None:
    path = programs("c++", "mine")
    source = [Path("a.cpp")]
    assert find_tools(source, {"PATH": path}) == Tools((f"{path}/c++",))
    assert find_tools(source, {"PATH": path, "CXX": "mine -m64"}) == Tools((f"{path}/mine", "-m64"))
    assert find_tools(source, {"PATH": "", "CXX": f"{path}/mine"}) == Tools((f"{path}/mine",))


def test_cuda_sources_take_nvcc_and_cuda_home_comes_first(programs: Callable[..., str]) -> None:
    path, home = programs("c++", "nvcc"), Path(programs("other"))
    shutil.copytree(path, home / "bin")
    sources = [Path("a.cpp"), Path("b.cu")]
    assert find_tools(sources, {"PATH": path}).nvcc == f"{path}/nvcc"
    assert find_tools(sources, {"PATH": path, "CUDA_HOME": str(home)}).nvcc == f"{home}/bin/nvcc"
    assert find_tools(sources[:1], {"PATH": path}).nvcc is None


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, r"the C\+\+ compiler 'c\+\+' isn't on PATH"),
        ({"CXX": "nosuch++ -m64"}, r"the C\+\+ compiler 'nosuch\+\+' isn't on PATH"),
        ({"CXX": "c++ 'open"}, "isn't a command: No closing quotation"),
    ],
)
def test_a_compiler_that_isnt_there_is_named(environ: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginLoadError, match=said):
        find_tools([Path("a.cpp")], {"PATH": str(tmp_path), **environ})


def test_no_nvcc_is_said(programs: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    here = programs("c++")
    # This machine may have one in the usual place.
    monkeypatch.setattr(shutil, "which", lambda name, path: which(name, path=path.replace("/usr/local/cuda/bin", "")))
    with pytest.raises(PluginLoadError, match="nvcc is neither in CUDA_HOME nor on PATH"):
        find_tools([Path("a.cu")], {"PATH": here})


def test_the_key_is_that_of_the_contents_wherever_they_lie(tmp_path: Path) -> None:
    one = recipe(package(tmp_path / "here" / "mine", a_cpp="int a;", b_h="int b;"))
    other = recipe(package(tmp_path / "there" / "mine", a_cpp="int a;", b_h="int b;"))
    assert one.key() == other.key()
    assert str(tmp_path) not in repr((one.flags, one.link_flags))


def test_every_input_of_a_build_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "mine", a_cpp="int a;", b_h="int b;")
    monkeypatch.delenv("CXX", raising=False)
    keys = [recipe(folder).key()]
    assert recipe(folder).key() == keys[0]

    def changed() -> None:
        keys.append(recipe(folder).key())

    (folder / "csrc" / "a.cpp").write_text("int a = 1;")
    changed()
    (folder / "csrc" / "b.h").write_text("int b = 1;")
    changed()
    (folder / "csrc" / "deep").mkdir()
    (folder / "csrc" / "deep" / "c.inc").write_text("")
    changed()
    (folder / "csrc" / "d.cpp").write_text("")
    changed()
    monkeypatch.setenv("CPATH", str(tmp_path))
    changed()
    monkeypatch.setenv("CXX", "c++ -g")
    changed()
    monkeypatch.setattr(Tools, "versions", lambda _: ("another compiler at the same path",))
    changed()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "another apache-tvm-ffi")
    changed()
    monkeypatch.setattr("platform.machine", lambda: "another machine")
    changed()
    headers = shutil.copytree(kernels.include_dir(), tmp_path / "include")
    (headers / "comm_core" / "version.h").write_text("// another comm-core")
    monkeypatch.setattr(toolchain, "include_dir", lambda: headers)
    changed()
    keys.append(dataclasses.replace(recipe(folder), flags=("-O0",)).key())
    keys.append(dataclasses.replace(recipe(folder), link_flags=("-O0",)).key())
    assert len(set(keys)) == len(keys) == 13


def test_a_compiler_says_its_version_into_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "mine", a_cpp="")
    compiler = tmp_path / "c++"
    keys = set()
    for version in ("1", "2"):
        compiler.write_text(f"#!/bin/sh\necho {version}\n")
        compiler.chmod(stat.S_IRWXU)
        monkeypatch.setenv("CXX", str(compiler))
        keys.add(recipe(folder).key())
    assert len(keys) == 2


def test_a_compiler_that_doesnt_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(PluginLoadError, match="/false --version fails"):
        recipe(package(tmp_path / "mine", a_cpp="")).key()


def test_only_sources_directly_in_the_folder_are_compiled(tmp_path: Path) -> None:
    folder = package(tmp_path / "mine", b_cpp="", a_cu="", c_h="", d_cc="")
    package(folder / "csrc", e_cpp="")
    assert [path.name for path in find_sources(folder)] == ["a.cu", "b.cpp"]


def test_the_headers_say_the_version_of_the_hooks() -> None:
    lines = (kernels.include_dir() / "comm_core" / "version.h").read_text().splitlines()
    found = {line.split()[1]: int(line.split()[2]) for line in lines if line.startswith("#define")}
    assert found == dict(zip(("COMM_CORE_HOOK_API_MAJOR", "COMM_CORE_HOOK_API_MINOR"), hookspecs.API, strict=True))
