"""Build and bind native code: C++ and CUDA sources that a plugin ships in its `csrc/` folder.

```python
library = kernels.Library("comm_plugin_mine")  # at import: touches nothing
library.missing()                              # in `probe()`: the reason why it can't work here, or None
library.load().my_function(x)                  # in `connect`: a `tvm_ffi.Module`
```

A wheel may contain a prebuilt shared object; otherwise it is compiled once into the user's cache. apache-tvm-ffi binds
it: its calling convention is independent of the versions of Python and torch, so one binary serves them all. Requires
the extra `kernels` of comm-core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from comm_core._control.deadline import describe
from comm_core._control.guard import raise_if_capturing
from comm_core._native import cache, toolchain
from comm_core._native.toolchain import include_dir
from comm_core.env import PREFIX, Settings
from comm_core.errors import CommError, PluginLoadError

if TYPE_CHECKING:
    from tvm_ffi import Module

__all__ = ["Library", "include_dir", "waits_by_rank"]


class _LibraryState:
    """The state of one package's library in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.module: Module | None = None


_states: dict[str, _LibraryState] = {}
# Each package has a lock, so that a slow build of one doesn't block another; the shared import has one more.
_import_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Library:
    """The native code of one package: every `*.cpp` and `*.cu` directly in its `csrc/`, as one shared object.

    The include path has `csrc/`, `include_dir()` and the headers of apache-tvm-ffi.

    Attributes:
        package: the import name of the package that has the folder `csrc/`.
    """

    package: str

    def missing(self) -> str | None:
        """Return the reason why `load` can't work on this machine; None if nothing is known to be missing.

        Local and cheap: reads files and PATH, never builds and never raises. Meant for a plugin's `probe()`.

        Returns:
            One sentence without a full stop, or None.
        """
        try:
            folder = self._folder()
            if _prebuilt(folder).is_file():
                return toolchain.missing_bindings()
            toolchain.find_tools(toolchain.find_sources(folder))
        except (PluginLoadError, OSError, ValueError) as error:
            return str(error).rstrip(".")
        return None

    def load(self) -> Module:
        """Return the bound library: prebuilt in the wheel, else from the cache, else built now. Thread-safe.

        Local, but a build takes seconds to minutes, once for all processes of a host: call it in `connect`, since the
        deadline of `connect` allows for a build.

        Returns:
            A module with the functions that the sources export with `TVM_FFI_DLL_EXPORT_TYPED_FUNC` as attributes.

        Raises:
            CaptureError: a CUDA stream is capturing, and this process hasn't loaded the library yet, even if it is in
                the cache: another rank's cache may lack it.
            CommTimeoutError: another process has been building it for longer than `COMM_CORE_CONNECT_TIMEOUT_S`.
            PluginLoadError: a requirement is missing, the build fails, or another user could write to the cache.
            ValueError: an environment variable can't be read.
        """
        state = _states.setdefault(self.package, _LibraryState())
        if state.module is not None:
            return state.module
        raise_if_capturing(
            f"the native code of {self.package!r}, which may have to be built first, can't be loaded",
            f"Call comm_core.kernels.Library({self.package!r}).load() before the capture; a backend does "
            "so in connect, which comm_core.get_backend(group) runs",
        )
        with state.lock:
            if state.module is None:
                state.module = self._load()
            return state.module

    def _load(self) -> Module:
        with _import_lock, _torch_extension_disabled():
            try:
                import tvm_ffi
            except ImportError as error:
                raise PluginLoadError(
                    f"the native code of {self.package!r} can't be bound: {describe(error)}. It needs apache-tvm-ffi: "
                    "pip install 'comm-core[kernels]'"
                ) from error
        path = _prebuilt(self._folder())
        is_cached = not path.is_file()
        if is_cached:
            path = self._build_cached()
        modified_ns = cache.mtime_ns(path)
        try:
            return tvm_ffi.load_module(path)
        except (OSError, RuntimeError, ValueError) as error:
            failure = error
        if is_cached:
            try:
                return tvm_ffi.load_module(self._build_cached(rejected_ns=modified_ns))
            except (OSError, RuntimeError, ValueError) as error:
                failure = error
        raise PluginLoadError(
            f"{path} can't be loaded: {describe(failure)}. It may be built on another machine or for another "
            "apache-tvm-ffi. Remove the file to have it built again"
        ) from failure

    def _build_cached(self, rejected_ns: int | None = None) -> Path:
        settings = Settings.read()
        top, timeout_s = cache.root(settings.cache_dir), settings.connect_timeout_s
        sources = toolchain.find_sources(self._folder())
        tools = toolchain.find_tools(sources)
        recipe = toolchain.make_recipe(self.package, sources, tools, _capabilities() if tools.cuda else ())
        try:
            folder = cache.private_folder(top, f"{self.package}-{recipe.key()}")
            return cache.build_once(
                folder,
                f"{self.package}.so",
                lambda scratch: recipe.build(scratch, timeout_s),
                timeout_s,
                rejected_ns=rejected_ns,
            )
        except CommError:
            raise
        except (OSError, RuntimeError) as error:  # a loop of links is the latter before Python 3.13
            raise PluginLoadError(
                f"the native code of {self.package!r} can't be built in the cache {top}: {describe(error)}. Set "
                f"{PREFIX}CACHE_DIR to a writable folder"
            ) from error

    def _folder(self) -> Path:
        try:
            spec = importlib.util.find_spec(self.package)
        except (ImportError, ValueError) as error:
            raise PluginLoadError(f"the package {self.package!r} can't be found: {describe(error)}") from error
        if spec is None or not spec.submodule_search_locations:
            raise PluginLoadError(f"{self.package!r} isn't an installed package with a folder")
        return Path(next(iter(spec.submodule_search_locations)))


def waits_by_rank(numbers: Iterable[int]) -> dict[int, tuple[int, float, float]]:
    """Return native counts of waits as the hook `waits` returns them.

    Args:
        numbers: for each rank in turn, the number of waits for it, their total time and the longest one, in
            nanoseconds, such as from `WaitCounters::read` in `<comm_core/host.h>`.

    Returns:
        By rank, the same numbers with times in microseconds. A rank without waits, such as this one, is left out.

    Raises:
        ValueError: a rank has fewer than three numbers.
    """
    flat = list(numbers)
    by_rank = enumerate(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    return {rank: (count, total_ns / 1e3, longest_ns / 1e3) for rank, (count, total_ns, longest_ns) in by_rank if count}


def _prebuilt(folder: Path) -> Path:
    """Return the path of the prebuilt shared object in the package's folder; the file may not exist."""
    return folder / toolchain.BUILT_FOLDER / f"{folder.name}.so"


def _capabilities() -> tuple[int, ...]:
    """Return the compute capabilities of the devices visible to torch, ascending, such as 90 for 9.0."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return tuple(sorted({10 * major + minor for major, minor in found}))


@contextlib.contextmanager
def _torch_extension_disabled() -> Iterator[None]:
    """Stop tvm_ffi from compiling an extension of torch during its import.

    tvm_ffi compiles one if torch is too old (before 2.10) to exchange tensors through DLPack's C interface: half a
    minute of work, into an unprotected cache of its own. Without the extension, tensors pass through Python, some
    microseconds slower.
    """
    switch = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    if "tvm_ffi" in sys.modules or switch in os.environ or not _would_compile_torch_extension():
        yield
        return
    os.environ[switch] = "1"
    try:
        yield
    finally:
        del os.environ[switch]


def _would_compile_torch_extension() -> bool:
    try:
        import torch
    except ImportError:
        return False
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return False
    return importlib.util.find_spec("torch_c_dlpack_ext") is None
