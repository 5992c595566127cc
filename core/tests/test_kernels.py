"""A package with sources is built, bound and called; by many processes at once, and where something is missing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import comm_core
import pytest
import torch
from comm_core._native import toolchain
from comm_core.errors import CaptureError, PluginLoadError
from comm_core.kernels import Library, waits_by_rank
from package_sources import ADD_CPP, EXPORT_H, FILL_CU, MACRO_CPP, VERSION_CPP

SOURCE = str(Path(comm_core.__file__).parents[1])
# Far longer than anything here takes; whoever runs into it fails.
DEADLINE_S = 200.0

# A compiler that counts what it compiles. While the file `slow` is there it writes garbage and hangs.
COMPILER = """
#!/bin/sh
case " $* " in *" -c "*)
    echo $$ >> {here}/compiled
    if [ -e {here}/slow ]; then
        for last; do :; done
        echo garbage > "$last"
        exec sleep 1000
    fi
esac
exec c++ "$@"
"""


class Package:
    """A package in a folder of its own, its cache, and a compiler that counts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.cache = folder, name, folder / "cache"
        self.csrc = folder / "site" / name / "csrc"
        self.csrc.mkdir(parents=True)
        (self.csrc.parent / "__init__.py").touch()
        self.compiler = folder / "counting-c++"
        self.compiler.write_text(COMPILER.format(here=folder).lstrip())
        self.compiler.chmod(stat.S_IRWXU)
        # With torch the processes would take seconds to start, and gigabytes.
        (folder / "site" / "torch.py").write_text("raise ImportError('not in this test')")

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.csrc / name.replace("_", ".")).write_text(text)

    @property
    def compiled(self) -> list[int]:
        """The compilers' process ids."""
        log = self.folder / "compiled"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def start(self, code: str, **environ: str) -> subprocess.Popen[str]:
        ours = {
            "PYTHONPATH": os.pathsep.join((str(self.folder / "site"), SOURCE, *sys.path[1:])),
            "COMM_CORE_CACHE_DIR": str(self.cache),
            "CXX": str(self.compiler),
        }
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, **ours, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_add(self, **environ: str) -> subprocess.Popen[str]:
        return self.start(
            f"from comm_core.kernels import Library; print(Library({self.name!r}).load().add(2, 3))", **environ
        )

    def contents(self) -> set[str]:
        """What is in the cache's folder of the only key."""
        (key,) = self.cache.iterdir()
        return {path.name for path in key.iterdir()}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    # A library is loaded once a process: each test has a name of its own.
    made = Package(tmp_path, f"mine_{abs(hash(tmp_path)):x}")
    made.write(add_cpp=ADD_CPP, detail_h="#define OFFSET 0\n", export_h=EXPORT_H)
    monkeypatch.syspath_prepend(tmp_path / "site")
    # Only the other processes shall not find torch.
    assert "torch" in sys.modules
    monkeypatch.setenv("COMM_CORE_CACHE_DIR", str(made.cache))
    monkeypatch.setenv("CXX", str(made.compiler))
    return made


def output(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    return said


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_package_is_built_bound_and_called(package: Package) -> None:
    package.write(add_cpp=MACRO_CPP)
    library = Library(package.name)
    assert library.missing() is None
    assert package.compiled == []
    module = library.load()
    assert module.add(2, 3) == 5
    assert module.major_version() == 1
    assert len(package.compiled) == 1
    assert Library(package.name).load() is module


def test_threads_share_one_load(package: Package) -> None:
    with ThreadPoolExecutor(8) as pool:
        modules = set(pool.map(lambda _: id(Library(package.name).load()), range(8)))
    assert len(modules) == len(package.compiled) == 1


def test_processes_at_once_build_once_and_the_next_finds_it(package: Package) -> None:
    processes = [package.start_add() for _ in range(5)]
    assert [output(process) for process in processes] == ["5\n"] * 5
    assert len(package.compiled) == 1
    assert output(package.start_add()) == "5\n"
    assert len(package.compiled) == 1
    assert package.contents() == {"lock", f"{package.name}.so", f"{package.name}.so.sha256"}


def test_a_cached_library_that_was_cut_short_is_built_again(package: Package) -> None:
    assert output(package.start_add()) == "5\n"
    (key,) = package.cache.iterdir()
    built = key / f"{package.name}.so"
    # Nothing; less than the header; most of it.
    for builds, part in enumerate((0.0, 0.0001, 0.9), start=2):
        with built.open("r+b") as file:
            file.truncate(int(built.stat().st_size * part))
        assert output(package.start_add()).endswith("5\n"), part
        assert len(package.compiled) == builds, part
    assert output(package.start_add()).endswith("5\n")
    assert len(package.compiled) == builds


def test_a_complete_library_that_cant_be_loaded_is_built_again_by_one_process(package: Package) -> None:
    assert output(package.start_add()) == "5\n"
    (key,) = package.cache.iterdir()
    (key / f"{package.name}.so").write_text("no code")
    (key / f"{package.name}.so.sha256").write_text(hashlib.sha256(b"no code").hexdigest())
    processes = [package.start_add() for _ in range(3)]
    assert all(output(process).endswith("5\n") for process in processes)
    assert len(package.compiled) == 2


def test_a_changed_header_is_built_again(package: Package) -> None:
    assert output(package.start_add()) == "5\n"
    package.write(detail_h="#define OFFSET 100\n")
    assert output(package.start_add()) == "105\n"
    assert len(package.compiled) == 2
    assert len(list(package.cache.iterdir())) == 2


def test_a_killed_builder_blocks_no_process_and_leaves_no_trusted_file(package: Package) -> None:
    (package.folder / "slow").touch()
    killed = package.start_add()
    wait_until(lambda: package.compiled)
    (package.folder / "slow").unlink()
    waiting = package.start_add()
    killed.kill()
    killed.communicate(timeout=DEADLINE_S)
    # The compiler outlives its builder, as it would where the builder ran out of memory.
    os.kill(package.compiled[0], signal.SIGKILL)
    assert output(waiting) == "5\n"
    assert len(package.compiled) == 2
    assert package.contents() == {"lock", f"{package.name}.so", f"{package.name}.so.sha256"}


def test_a_compiler_that_hangs_is_ended_with_its_family(package: Package) -> None:
    (package.folder / "slow").touch()
    process = package.start_add(COMM_CORE_CONNECT_TIMEOUT_S="1")
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "PluginLoadError: counting-c++ hasn't finished in time" in said
    (compiler,) = package.compiled
    with pytest.raises(ProcessLookupError):
        os.kill(compiler, 0)
    assert package.contents() == {"lock", "failure.txt"}


def test_a_build_that_fails_says_the_compilers_last_lines(package: Package) -> None:
    package.write(add_cpp="#error this is no code\n", other_cpp="int fine;\n")
    with pytest.raises(PluginLoadError, match=r"(?s)c\+\+ exits with 1:.*add\.cpp:1:2.*this is no code.*in: /"):
        Library(package.name).load()
    package.write(add_cpp=ADD_CPP)
    assert Library(package.name).load().add(2, 3) == 5


def test_what_nothing_defines_is_found_when_it_is_linked(package: Package) -> None:
    package.write(add_cpp=ADD_CPP.replace("return a", "extern int64_t nowhere(); return nowhere() + a"))
    with pytest.raises(PluginLoadError, match=r"(?s)exits with 1:.*undefined reference to .*nowhere"):
        Library(package.name).load()


def test_warnings_are_logged(package: Package, caplog: pytest.LogCaptureFixture) -> None:
    package.write(add_cpp=ADD_CPP.replace("return a", "int unused; return a"))
    assert Library(package.name).load().add(2, 3) == 5
    assert "unused variable" in caplog.text


def test_a_cache_that_others_can_write_is_refused_before_anything_is_built(package: Package) -> None:
    package.cache.mkdir()
    package.cache.chmod(0o777)
    with pytest.raises(PluginLoadError, match="others can write"):
        Library(package.name).load()
    assert package.compiled == []


def test_a_cache_that_cant_be_made_is_said(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMM_CORE_CACHE_DIR", str(package.compiler / "cache"))
    with pytest.raises(PluginLoadError, match=r"can't be built in the cache .*Set COMM_CORE_CACHE_DIR"):
        Library(package.name).load()


def test_garbage_is_an_error_that_names_the_file(package: Package) -> None:
    built = package.csrc.parent / "_lib" / f"{package.name}.so"
    built.parent.mkdir()
    built.write_text("no code")
    with pytest.raises(PluginLoadError, match=rf"{built} can't be loaded"):
        Library(package.name).load()


def without_a_compiler(package: Package, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(package.folder))
    return "it has to be compiled here, and the C++ compiler 'c++' isn't on PATH"


def without_bindings(package: Package, monkeypatch: pytest.MonkeyPatch) -> str:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tvm_ffi" else find(name))
    return "apache-tvm-ffi isn't installed"


def without_sources(package: Package, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(package.csrc)
    return f"there is no *.cpp and no *.cu in {package.csrc}"


def without_the_package(package: Package, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.rmtree(package.csrc.parent)
    return f"'{package.name}' isn't an installed package"


@pytest.mark.parametrize("remove", [without_a_compiler, without_bindings, without_sources, without_the_package])
def test_what_is_missing_is_one_sentence_and_loading_says_it_too(
    remove: Callable[[Package, pytest.MonkeyPatch], str], package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = remove(package, monkeypatch)
    library = Library(package.name)
    missing = library.missing()
    assert missing is not None
    assert missing.startswith(said)
    assert "\n" not in missing
    assert not missing.endswith(".")
    with pytest.raises(PluginLoadError) as caught:
        library.load()
    assert missing in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "no such", "..x", "sys", "comm_core.kernels"])
def test_a_name_of_no_package_is_said(name: str) -> None:
    assert Library(name).missing() is not None
    with pytest.raises(PluginLoadError):
        Library(name).load()


def test_a_ready_made_library_takes_no_compiler(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = toolchain.find_sources(package.csrc.parent)
    recipe = toolchain.make_recipe(package.name, sources, toolchain.find_tools(sources))
    (scratch := package.folder / "scratch").mkdir()
    (package.csrc.parent / "_lib").mkdir()
    recipe.build(scratch).rename(package.csrc.parent / "_lib" / f"{package.name}.so")
    without_a_compiler(package, monkeypatch)
    assert Library(package.name).missing() is None
    assert Library(package.name).load().add(2, 3) == 5
    assert not package.cache.exists()


def test_nothing_is_loaded_first_while_a_stream_captures(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    load = rf"Call comm_core.kernels.Library\('{package.name}'\).load\(\) before the capture"
    with pytest.raises(CaptureError, match=load):
        Library(package.name).load()
    assert package.compiled == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    Library(package.name).load()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert Library(package.name).load().add(2, 3) == 5


def test_counted_waits_are_by_rank_in_microseconds() -> None:
    assert waits_by_rank(iter([2, 2000, 1500, 0, 0, 0, 3, 4500, 2500])) == {0: (2, 2.0, 1.5), 2: (3, 4.5, 2.5)}
    assert waits_by_rank([]) == {}
    with pytest.raises(ValueError, match="shorter"):
        waits_by_rank([2, 2000])


def test_the_import_brings_neither_torch_nor_bindings(package: Package) -> None:
    process = package.start("import sys, comm_core.kernels; print({'torch', 'tvm_ffi'} & set(sys.modules))")
    assert output(process) == "set()\n"


def test_the_bindings_compile_nothing_for_an_older_torch(package: Package) -> None:
    (package.folder / "site" / "torch.py").unlink()
    folder = package.folder / "tvm-ffi"
    code = f"""
    import os, torch
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        del torch.Tensor.__dlpack_c_exchange_api__
    from comm_core.kernels import Library
    before = dict(os.environ)
    print(Library({package.name!r}).load().add(2, 3))
    assert dict(os.environ) == before
    import tvm_ffi
    assert torch.equal(torch.from_dlpack(tvm_ffi.from_dlpack(torch.ones(3))), torch.ones(3))
    """
    assert output(package.start(code, TVM_FFI_CACHE_DIR=str(folder))) == "5\n"
    assert not folder.exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
def test_cuda_sources_are_built_by_nvcc(package: Package, caplog: pytest.LogCaptureFixture) -> None:
    package.write(fill_cu=FILL_CU, version_cpp=VERSION_CPP)
    assert Library(package.name).missing() is None
    module = Library(package.name).load()
    assert module.add(2, 3) == 5
    # Its own runtime: it needs no driver to say which one it is.
    assert module.runtime_version() >= 11000
    assert callable(module.launch)
    assert caplog.text == ""


@pytest.mark.gpus(1)
def test_a_kernel_runs_beside_torch(package: Package) -> None:
    package.write(fill_cu=FILL_CU)
    x = torch.zeros(32, device="cuda")
    assert Library(package.name).load().launch(x.data_ptr(), 2.0) == 0
    torch.cuda.synchronize()
    assert x.tolist() == [2.0] * 32
