"""Compile a package's `csrc/` into one shared object, without torch: wheels are built without it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from comm_core.errors import PluginLoadError

__all__ = [
    "BUILT_FOLDER",
    "Recipe",
    "Tools",
    "find_sources",
    "find_tools",
    "gencode",
    "include_dir",
    "make_recipe",
    "missing_bindings",
]

_log = logging.getLogger("comm_core")
#: The folder of the shared object inside a package, in a wheel for one platform.
BUILT_FOLDER = "_lib"
# The compute capabilities in a wheel: data-centre GPUs of Ampere, Hopper and Blackwell; the newest also as PTX, which
# the driver compiles for later GPUs.
_WHEEL_ARCHS = (80, 90, 100)
_HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Environment variables that the compilers read; they are part of a binary's key.
_READ_BY_COMPILERS = (
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
)
# Lines of a compiler's output in an error: enough for a template's error with its points of instantiation.
_LAST_LINES = 30


@dataclasses.dataclass(frozen=True)
class Tools:
    """The compilers of one build.

    Attributes:
        cxx: the C++ compiler's command.
        nvcc: the CUDA compiler, which then compiles and links everything; None without CUDA sources.
    """

    cxx: tuple[str, ...]
    nvcc: str | None = None

    @property
    def cuda(self) -> bool:
        """True if there are CUDA sources."""
        return self.nvcc is not None

    def versions(self) -> tuple[str, ...]:
        """Return the version text of each compiler."""
        commands = [self.cxx] if self.nvcc is None else [self.cxx, (self.nvcc,)]
        return tuple(_output((*command, "--version")) for command in commands)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The complete input of one shared object's build.

    Attributes:
        package: the package's import name, and the shared object's.
        sources: files in one folder; they may include the other files of the folder.
        tools: the compilers.
        flags: the flags for compiling, independent of the package's location.
        link_flags: the flags for linking.
    """

    package: str
    sources: tuple[Path, ...]
    tools: Tools
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    def key(self) -> str:
        """Return the binary's key: a digest of all inputs of the build. Runs each compiler for its version."""
        parts = [
            json.dumps([self.tools.cxx, self.tools.nvcc, self.flags, self.link_flags]),
            json.dumps({name: os.environ.get(name) for name in _READ_BY_COMPILERS}),
            *self.tools.versions(),
            importlib.metadata.version("apache-tvm-ffi"),
            platform.machine(),
        ]
        for folder in (self.sources[0].parent, include_dir()):
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                parts += [str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def build(self, folder: Path, timeout_s: float | None = None) -> Path:
        """Compile and link.

        Args:
            folder: an empty folder for the result and all by-products.
            timeout_s: the deadline of the whole build, in seconds; None: no deadline.

        Returns:
            The path of the shared object.

        Raises:
            PluginLoadError: a compiler fails or misses the deadline; the text has its last lines.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        compiler = self.tools.cxx if self.tools.nvcc is None else (self.tools.nvcc,)
        bindings = _bindings()
        includes = [f"-I{self.sources[0].parent}", f"-I{include_dir()}"]
        for path in dict.fromkeys(bindings[:2]):
            includes += ["-isystem", path]  # only the package's own code gives warnings
        objects = [f"{source.name}.o" for source in self.sources]
        compiles = [
            [*compiler, *self.flags, *includes, "-c", str(source), "-o", name]
            for source, name in zip(self.sources, objects, strict=True)
        ]
        at_once = os.cpu_count() or 1
        for first in range(0, len(compiles), at_once):
            _run(compiles[first : first + at_once], folder, deadline)
        built = f"{self.package}.so"
        _run([[*compiler, *objects, *self.link_flags, f"-L{bindings[2]}", "-ltvm_ffi", "-o", built]], folder, deadline)
        return folder / built


def include_dir() -> Path:
    """Return the folder of core's headers, included as `<comm_core/...>`."""
    return Path(__file__).parents[1] / "include"


def find_sources(package: Path) -> tuple[Path, ...]:
    """Return the sources of the package in that folder, sorted by name.

    Raises:
        PluginLoadError: there are none.
    """
    folder = package / "csrc"
    found = tuple(sorted(path for pattern in ("*.cpp", "*.cu") for path in folder.glob(pattern)))
    if not found:
        raise PluginLoadError(f"there is no *.cpp and no *.cu in {folder}")
    return found


def missing_bindings() -> str | None:
    """Return why native code can't be bound here, a sentence without a full stop; None if it can."""
    if importlib.util.find_spec("tvm_ffi") is not None:
        return None
    return "apache-tvm-ffi isn't installed; it comes with the extra kernels of comm-core"


def find_tools(sources: Collection[Path], environ: Mapping[str, str] = os.environ) -> Tools:
    """Return the compilers for `sources`. Searches PATH, runs nothing.

    Raises:
        PluginLoadError: a compiler or apache-tvm-ffi is missing; the text is a sentence without a full stop.
    """
    reason = missing_bindings()
    if reason is not None:
        raise PluginLoadError(reason)
    try:
        cxx = tuple(shlex.split(environ.get("CXX", ""))) or ("c++",)
    except ValueError as error:
        raise PluginLoadError(f"CXX={environ['CXX']!r} isn't a command: {error}") from error
    found = shutil.which(cxx[0], path=environ.get("PATH"))
    if found is None:
        raise PluginLoadError(
            f"it has to be compiled here, and the C++ compiler {cxx[0]!r} isn't on PATH; install one, or set CXX"
        )
    tools = Tools((found, *cxx[1:]))
    if not any(source.suffix == ".cu" for source in sources):
        return tools
    homes = (environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [f"{home}/bin" for home in homes[:2] if home] + [environ.get("PATH", ""), f"{homes[2]}/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise PluginLoadError(
            "it has to be compiled here, and nvcc is neither in CUDA_HOME nor on PATH; install the CUDA toolkit"
        )
    return dataclasses.replace(tools, nvcc=nvcc)


def make_recipe(package: str, sources: tuple[Path, ...], tools: Tools, capabilities: Collection[int] = ()) -> Recipe:
    """Choose the flags of a build.

    Args:
        package: the package's import name.
        sources: the sources, all in one folder.
        tools: the compilers.
        capabilities: the compute capabilities to compile CUDA for, such as 90 for 9.0; none: a wheel's.

    Raises:
        PluginLoadError: this nvcc can't compile for one of them.
    """
    if tools.nvcc is None:
        return Recipe(
            package,
            sources,
            tools,
            flags=("-std=c++17", "-O3", *_HOST_FLAGS),
            link_flags=("-shared", "-Wl,--no-undefined", "-pthread", "-ldl", "-lrt"),
        )
    listed = _output((tools.nvcc, "--list-gpu-arch")).split()
    supported = [int(number) for _, _, number in (line.partition("_") for line in listed) if number.isdecimal()]
    # Each binary links the CUDA runtime statically: torch's own may be of another major version.
    common = ("-cudart=static", *_host_compiler(tools), *gencode(capabilities, supported))
    return Recipe(
        package,
        sources,
        tools,
        flags=("-std=c++17", "-O3", f"-Xcompiler={','.join(_HOST_FLAGS)}", *common),
        link_flags=("-shared", "-Xlinker=--no-undefined", *common, "-lpthread", "-ldl", "-lrt"),
    )


def gencode(capabilities: Collection[int], supported: Collection[int]) -> tuple[str, ...]:
    """Return nvcc's flags for code generation.

    Args:
        capabilities: the devices' compute capabilities, such as 90 for 9.0; none: those of a wheel.
        supported: the compute capabilities that this nvcc supports.

    Returns:
        A flag for each: machine code if nvcc supports the device, else PTX of the newest older one.

    Raises:
        PluginLoadError: this nvcc supports neither a device nor an older one.
    """
    wanted = set(capabilities) or set(_WHEEL_ARCHS) & set(supported) or {max(supported, default=0)}
    as_ptx = {max((known for known in supported if known <= one), default=0) for one in wanted - set(supported)}
    if not capabilities:
        as_ptx.add(max(wanted))
    if 0 in as_ptx:
        raise PluginLoadError(
            f"this nvcc compiles for compute capabilities {sorted(supported)}, which don't serve {sorted(wanted)}"
        )
    machine = (f"-gencode=arch=compute_{one},code=sm_{one}" for one in sorted(wanted & set(supported)))
    return (*machine, *(f"-gencode=arch=compute_{one},code=compute_{one}" for one in sorted(as_ptx)))


def _host_compiler(tools: Tools) -> tuple[str, ...]:
    """Return the flag that makes CXX nvcc's host compiler, unless NVCC_CCBIN is set or CXX has arguments."""
    if "CXX" in os.environ and "NVCC_CCBIN" not in os.environ and len(tools.cxx) == 1:
        return (f"-ccbin={tools.cxx[0]}",)
    return ()


def _bindings() -> tuple[str, str, str]:
    """Return the folders of apache-tvm-ffi: its headers, DLPack's headers, its library.

    Runs its command in a separate process: importing it would import torch.
    """
    options = ("--includedir", "--dlpack-includedir", "--libdir")
    include, dlpack, library = _output((sys.executable, "-m", "tvm_ffi.config", *options)).splitlines()
    return include, dlpack, library


def _output(command: Sequence[str]) -> str:
    """Return the output of a short command.

    Raises:
        PluginLoadError: the command fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - a compiler
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or ""
        raise PluginLoadError(f"{shlex.join(command)} fails: {error} {stderr}".strip()) from error
    return done.stdout


def _run(commands: Sequence[Sequence[str]], folder: Path, deadline: float | None) -> None:
    """Run commands in parallel in `folder`, which also gets their temporary files; the first failure kills them all."""
    running: list[tuple[Sequence[str], Path, subprocess.Popen[bytes]]] = []
    try:
        for number, command in enumerate(commands):
            log = folder / f"{number}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(  # noqa: S603 - a compiler
                    command,
                    cwd=folder,
                    env={**os.environ, "TMPDIR": str(folder)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running.append((command, log, process))
        for command, log, process in running:
            status = process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if status:
                raise PluginLoadError(_failure_text(command, log, f"exits with {status}"))
            if log.stat().st_size:
                _log.warning("%s", _failure_text(command, log, "has warnings"))
    except subprocess.TimeoutExpired:
        raise PluginLoadError(_failure_text(command, log, "hasn't finished in time")) from None
    finally:
        for _, _, process in running:
            if process.poll() is None:
                # The compiler starts subprocesses; the whole process group is killed.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _failure_text(command: Sequence[str], log: Path, what: str) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"{Path(command[0]).name} {what}:", *lines, f"in: {shlex.join(command)}"])
