"""Compiles a package's `csrc/` into one shared object. Knows nothing of torch: wheels are built without it."""

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

__all__ = ["BUILT", "Recipe", "Tools", "find_tools", "gencode", "include_dir", "no_bindings", "plan", "sources_of"]

_log = logging.getLogger("comm_core")
#: The folder inside a package that has its shared object, in a wheel for one platform.
BUILT = "_lib"
# What a wheel is compiled for: Ampere's, Hopper's and Blackwell's data-centre parts; the newest also as PTX, which the
# driver compiles for what comes later.
_WHEEL_ARCHS = (80, 90, 100)
_HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Other inputs of a build, part of a binary's key: all that the compilers themselves read from the environment.
_READ_BY_COMPILERS = (
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
)
# Enough for a template's error with where it was instantiated.
_LAST_LINES = 30


@dataclasses.dataclass(frozen=True)
class Tools:
    """The compilers of one build.

    Attributes:
        cxx: the C++ compiler's command.
        nvcc: CUDA's compiler, which then compiles and links everything; None without CUDA sources.
    """

    cxx: tuple[str, ...]
    nvcc: str | None = None

    @property
    def cuda(self) -> bool:
        """Whether there is CUDA to compile."""
        return self.nvcc is not None

    def versions(self) -> tuple[str, ...]:
        """What each compiler says that it is."""
        commands = [self.cxx] if self.nvcc is None else [self.cxx, (self.nvcc,)]
        return tuple(_output((*command, "--version")) for command in commands)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one shared object is made.

    Attributes:
        package: the package's import name, and the shared object's.
        sources: files in one folder; what else is in it may be included by them.
        tools: the compilers.
        flags: for compiling; nothing in them depends on where the package lies.
        link_flags: for linking.
    """

    package: str
    sources: tuple[Path, ...]
    tools: Tools
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]

    def key(self) -> str:
        """Names the binary: a digest of everything that goes into it. Runs each compiler for its version."""
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
            folder: an empty one for the result and all by-products.
            timeout_s: for the whole, in seconds; None for no limit.

        Returns:
            The shared object.

        Raises:
            PluginLoadError: a compiler fails, or isn't done in time; with its last lines.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        compiler = self.tools.cxx if self.tools.nvcc is None else (self.tools.nvcc,)
        bindings = _bindings()
        includes = [f"-I{self.sources[0].parent}", f"-I{include_dir()}"]
        for path in dict.fromkeys(bindings[:2]):
            includes += ["-isystem", path]  # warnings are for the package's own code
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
    """The folder of the headers that core ships, included as `<comm_core/...>`."""
    return Path(__file__).parents[1] / "include"


def sources_of(package: Path) -> tuple[Path, ...]:
    """What is compiled of the package in that folder, by name.

    Raises:
        PluginLoadError: there is nothing.
    """
    folder = package / "csrc"
    found = tuple(sorted(path for pattern in ("*.cpp", "*.cu") for path in folder.glob(pattern)))
    if not found:
        raise PluginLoadError(f"there is no *.cpp and no *.cu in {folder}")
    return found


def no_bindings() -> str | None:
    """Why nothing can be bound here, in a sentence without a full stop; None where it can."""
    if importlib.util.find_spec("tvm_ffi") is not None:
        return None
    return "apache-tvm-ffi isn't installed; it comes with the extra kernels of comm-core"


def find_tools(sources: Collection[Path], environ: Mapping[str, str] = os.environ) -> Tools:
    """The compilers that `sources` take. Looks at PATH, runs nothing.

    Raises:
        PluginLoadError: one isn't there, nor what binds their output, in a sentence without a full stop.
    """
    reason = no_bindings()
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


def plan(package: str, sources: tuple[Path, ...], tools: Tools, capabilities: Collection[int] = ()) -> Recipe:
    """Settle every flag.

    Args:
        package: the package's import name.
        sources: what to compile, all in one folder.
        tools: what to compile it with.
        capabilities: compute capabilities to compile CUDA for, such as 90 for 9.0; none: a wheel's.

    Raises:
        PluginLoadError: this nvcc compiles for none of them.
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
    # One CUDA runtime inside each binary: torch's own may be of another major version.
    common = ("-cudart=static", *_host_compiler(tools), *gencode(capabilities, supported))
    return Recipe(
        package,
        sources,
        tools,
        flags=("-std=c++17", "-O3", f"-Xcompiler={','.join(_HOST_FLAGS)}", *common),
        link_flags=("-shared", "-Xlinker=--no-undefined", *common, "-lpthread", "-ldl", "-lrt"),
    )


def gencode(capabilities: Collection[int], supported: Collection[int]) -> tuple[str, ...]:
    """What nvcc generates code for.

    Args:
        capabilities: of the devices that the code is for, such as 90 for 9.0; none: those of a wheel.
        supported: what this nvcc knows.

    Returns:
        A flag for each: machine code where nvcc knows the device, else PTX of the newest that is older.

    Raises:
        PluginLoadError: this nvcc knows a device neither itself nor by an older one.
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
    """CXX goes for what nvcc hands on, too, unless its own variable says otherwise, or it isn't a mere program."""
    if "CXX" in os.environ and "NVCC_CCBIN" not in os.environ and len(tools.cxx) == 1:
        return (f"-ccbin={tools.cxx[0]}",)
    return ()


def _bindings() -> tuple[str, str, str]:
    """The folders of apache-tvm-ffi: its headers, DLPack's headers, its library.

    Its own command tells, in a process of its own: to import it would import torch.
    """
    options = ("--includedir", "--dlpack-includedir", "--libdir")
    include, dlpack, library = _output((sys.executable, "-m", "tvm_ffi.config", *options)).splitlines()
    return include, dlpack, library


def _output(command: Sequence[str]) -> str:
    """What a command prints that ends at once.

    Raises:
        PluginLoadError: it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - a compiler
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or ""
        raise PluginLoadError(f"{shlex.join(command)} fails: {error} {said}".strip()) from error
    return done.stdout


def _run(commands: Sequence[Sequence[str]], folder: Path, deadline: float | None) -> None:
    """Run commands side by side in `folder`, which also gets their temporary files; the first failure ends them all."""
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
                raise PluginLoadError(_report(command, log, f"exits with {status}"))
            if log.stat().st_size:
                _log.warning("%s", _report(command, log, "has warnings"))
    except subprocess.TimeoutExpired:
        raise PluginLoadError(_report(command, log, "isn't done in time")) from None
    finally:
        for _, _, process in running:
            if process.poll() is None:
                # The compiler is a family of processes, in a session of its own.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _report(command: Sequence[str], log: Path, what: str) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"{Path(command[0]).name} {what}:", *lines, f"in: {shlex.join(command)}"])
