"""The host code that shares device memory, compiled and run against a stand-in for the CUDA driver: fake_cuda.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_code import CUDA, binding, compiled, needs_compiler

HERE = Path(__file__).parent
BINDING = """
#include <comm_core/virtual_memory.h>
#include <tvm/ffi/tvm_ffi.h>
#include <memory>

static tvm::ffi::Array<tvm::ffi::Function> virtual_memory(int device) {
    using tvm::ffi::Function;
    const auto memory = std::make_shared<comm_core::VirtualMemory>(device);
    return {Function::FromTyped([memory](int64_t nbytes) { return memory->create(nbytes); }),
            Function::FromTyped([memory](int64_t number) { return memory->export_file(number); }),
            Function::FromTyped([memory](int file) { return memory->import_file(file); }),
            Function::FromTyped([memory](int64_t number, int64_t nbytes) -> int64_t {
                return memory->map(number, nbytes);
            }),
            Function::FromTyped([memory]() { memory->close(); })};
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(virtual_memory, virtual_memory);
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_compiler()
    if not (CUDA / "cuda.h").is_file():
        pytest.skip(f"there are no CUDA headers in {CUDA} on this machine")
    folder = tmp_path_factory.mktemp("virtual_memory")
    compiled(folder, "-shared", "-fPIC", HERE / "fake_cuda.cpp", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1")
    return folder


def test_a_peer_maps_what_its_owner_exports(built: Path) -> None:
    compiled(built, HERE / "virtual_memory.cpp", "-o", "program", "libcuda.so.1", "-ldl", "-Wl,-rpath,$ORIGIN")
    done = subprocess.run([built / "program"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("0 failures\n", 0), done.stderr


def test_it_loads_where_there_is_no_driver(built: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.cpp").write_text(
        "#include <comm_core/virtual_memory.h>\n"
        "#include <cstdio>\n"
        "int main() {\n"
        "    try { comm_core::VirtualMemory memory(0); return 1; }\n"
        "    catch (const std::runtime_error& error) { std::puts(error.what()); }\n"
        "}\n"
    )
    # A driver that has nothing in it, in front of whatever this machine has.
    (tmp_path / "empty.cpp").write_text("")
    compiled(tmp_path, "-shared", "-fPIC", "empty.cpp", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1")
    compiled(tmp_path, "ask.cpp", "-o", "ask", "-ldl")
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([tmp_path / "ask"], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "the CUDA driver is too old: it has no cu" in done.stdout


def test_two_processes_map_each_others_memory(built: Path) -> None:
    (built / "binding.cpp").write_text(BINDING)
    binding(built, "binding.cpp", "-ldl")
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "virtual_memory_rank.py", str(rank), built],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(built / "libcuda.so.1")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [(out, rank.returncode) for rank, (out, _) in zip(ranks, said, strict=True)] == [("right\n", 0)] * 2, said
