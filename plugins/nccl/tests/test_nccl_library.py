"""One NCCL in the process, or the reason why there can't be; with libraries built for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comm_plugin_nccl import library

CXX = os.environ.get("CXX", "c++")

# Loads the libraries as torch would, and prints the version or the reason. Without torch, which may have its own NCCL.
ASK = """
import ctypes, importlib.util, sys, types

file, torchs, others, bound, importable = sys.argv[1:]
for path in filter(None, (others, torchs)):
    ctypes.CDLL(path)
sys.modules["nccl"] = None
if importable == "yes":
    binding = types.ModuleType("nccl.bindings.nccl")
    binding.get_library_path = lambda: bound
    binding.get_version = lambda: 22809
    sys.modules["nccl"] = sys.modules["nccl.bindings"] = types.ModuleType("nccl")
    sys.modules["nccl.bindings.nccl"] = binding
spec = importlib.util.spec_from_file_location("library", file)
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
try:
    print(library.version(library.load()))
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two NCCLs and three torches: one that needs the first NCCL, one with NCCL built in, one without."""
    if shutil.which(CXX) is None:
        pytest.skip(f"there is no C++ compiler ({CXX}) on this machine")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "nccl.cpp").write_text('extern "C" int ncclGetVersion(int* v) { return *v = 22809, 0; }\n')
    (folder / "needs.cpp").write_text('extern "C" int ncclGetVersion(int*);\nint f() { return ncclGetVersion(0); }\n')
    (folder / "none.cpp").write_text("int f() { return 0; }\n")

    def build(to: str, source: str, soname: str, *more: str) -> None:
        (folder / to).parent.mkdir(exist_ok=True)
        command = [CXX, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", to, source, *more]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)

    build("nccl/libnccl.so.2", "nccl.cpp", "libnccl.so.2")
    build("other/libnccl.so.2", "nccl.cpp", "libnccl.so.2")
    build("needs.so", "needs.cpp", "libtorch_cuda.so", "nccl/libnccl.so.2", "-Wl,-rpath,$ORIGIN/nccl")
    build("builtin.so", "nccl.cpp", "libtorch_cuda.so")
    build("none.so", "none.cpp", "libtorch_cuda.so")
    return folder


@pytest.mark.parametrize(
    ("torchs", "others", "bound", "importable", "says"),
    [
        ("needs.so", "", "nccl/libnccl.so.2", "yes", "2.28.9"),
        ("", "", "", "yes", "torch has no NCCL"),
        ("none.so", "nccl/libnccl.so.2", "nccl/libnccl.so.2", "yes", "torch has no NCCL"),
        ("builtin.so", "", "", "yes", "torch's NCCL isn't this process's libnccl.so.2"),
        ("builtin.so", "nccl/libnccl.so.2", "nccl/libnccl.so.2", "yes", "isn't this process's libnccl.so.2"),
        ("needs.so", "", "", "no", "nccl4py can't be imported"),
        ("needs.so", "other/libnccl.so.2", "nccl/libnccl.so.2", "yes", "nccl4py has bound another NCCL than torch's"),
    ],
)
def test_only_torchs_is_bound(made: Path, torchs: str, others: str, bound: str, importable: str, says: str) -> None:
    paths = [str(made / path) if path else "" for path in (torchs, others, bound)]
    command = [sys.executable, "-c", ASK, library.__file__, *paths, importable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
