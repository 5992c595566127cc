"""Build and bind native code: C++ and CUDA sources that a plugin ships in its `csrc/` folder.

```python
library = kernels.Library("comm_plugin_mine")  # at import: touches nothing
library.missing()                              # in `probe()`: why it can't work here, or None
library.load().my_function(x)                  # in `connect`: a `tvm_ffi.Module`
```

A wheel may contain the shared object ready made; otherwise it is compiled once into the user's cache. It is bound by
apache-tvm-ffi, whose calling convention depends on neither Python's version nor torch's: one binary serves them all.
Needs the extra `kernels` of comm-core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from comm_core._control.deadline import describe
from comm_core._control.guard import refuse_capture
from comm_core._native import cache, toolchain
from comm_core._native.toolchain import include_dir
from comm_core.env import PREFIX, Settings
from comm_core.errors import CommError, PluginLoadError

if TYPE_CHECKING:
    from tvm_ffi import Module

__all__ = ["Library", "include_dir"]


class _Slot:
    """What one process has of one package's library."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.module: Module | None = None


_slots: dict[str, _Slot] = {}
# A lock for each package, so that a slow build of one keeps no other waiting; one for the import that all share.
_import_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Library:
    """The native code of one package: every `*.cpp` and `*.cu` directly in its `csrc/`, as one shared object.

    Headers in `csrc/`, those of `include_dir()` and those of apache-tvm-ffi are on the include path.

    Attributes:
        package: the import name of the package that has the folder `csrc/`.
    """

    package: str

    def missing(self) -> str | None:
        """Return why `load` can't work on this machine; None if nothing is known to be missing.

        Local and cheap: looks at files and at PATH; never builds and never raises. Meant for a plugin's `probe()`.

        Returns:
            One sentence without a full stop, or None.
        """
        try:
            folder = self._folder()
            if _prebuilt(folder).is_file():
                return toolchain.no_bindings()
            toolchain.find_tools(toolchain.sources_of(folder))
        except (PluginLoadError, OSError, ValueError) as error:
            return str(error).rstrip(".")
        return None

    def load(self) -> Module:
        """Return the bound library: ready made in the wheel, else cached, else built now. Any thread may call it.

        Local, but a build takes seconds to minutes, once for all processes of a host: call it in `connect`, whose
        deadline allows for that.

        Returns:
            A module whose attributes are the functions that the sources export with `TVM_FFI_DLL_EXPORT_TYPED_FUNC`.

        Raises:
            CaptureError: a CUDA stream captures, and this process hasn't loaded the library yet. Also if the library is
                in this rank's cache, since another rank's may lack it.
            CommTimeoutError: another process has been building it for longer than `COMM_CORE_CONNECT_TIMEOUT_S`.
            PluginLoadError: something is missing, the build fails, or the cache can't be trusted.
            ValueError: an environment variable can't be read.
        """
        slot = _slots.setdefault(self.package, _Slot())
        if slot.module is not None:
            return slot.module
        refuse_capture(
            f"the native code of {self.package!r}, which may have to be built first, can't be loaded",
            f"Call comm_core.kernels.Library({self.package!r}).load() before the capture; a backend does "
            "so in connect, which comm_core.get_backend(group) runs",
        )
        with slot.lock:
            if slot.module is None:
                slot.module = self._load()
            return slot.module

    def _load(self) -> Module:
        path = _prebuilt(self._folder())
        if not path.is_file():
            path = self._built()
        with _import_lock, _no_torch_extension():
            try:
                import tvm_ffi
            except ImportError as error:
                raise PluginLoadError(
                    f"the native code of {self.package!r} can't be bound: {describe(error)}. It takes apache-tvm-ffi: "
                    "pip install 'comm-core[kernels]'"
                ) from error
        try:
            return tvm_ffi.load_module(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise PluginLoadError(
                f"{path} can't be loaded: {describe(error)}. Built elsewhere, or for another apache-tvm-ffi? Without "
                "that file it is built anew"
            ) from error

    def _built(self) -> Path:
        settings = Settings.read()
        top, timeout_s = cache.root(settings.cache_dir), settings.connect_timeout_s
        sources = toolchain.sources_of(self._folder())
        tools = toolchain.find_tools(sources)
        recipe = toolchain.plan(self.package, sources, tools, _capabilities() if tools.cuda else ())
        try:
            folder = cache.private_folder(top, f"{self.package}-{recipe.key()}")
            return cache.build_once(
                folder, f"{self.package}.so", lambda scratch: recipe.build(scratch, timeout_s), timeout_s
            )
        except CommError:
            raise
        except (OSError, RuntimeError) as error:  # a loop of links is the latter before Python 3.13
            raise PluginLoadError(
                f"the native code of {self.package!r} can't be built in the cache {top}: {describe(error)}. Set "
                f"{PREFIX}CACHE_DIR to a folder that can be written"
            ) from error

    def _folder(self) -> Path:
        try:
            spec = importlib.util.find_spec(self.package)
        except (ImportError, ValueError) as error:
            raise PluginLoadError(f"the package {self.package!r} can't be found: {describe(error)}") from error
        if spec is None or not spec.submodule_search_locations:
            raise PluginLoadError(f"{self.package!r} isn't a package with a folder of its own that is installed here")
        return Path(next(iter(spec.submodule_search_locations)))


def _prebuilt(folder: Path) -> Path:
    """Where the wheel of the package in `folder` has its shared object, if it has one."""
    return folder / toolchain.BUILT / f"{folder.name}.so"


def _capabilities() -> tuple[int, ...]:
    """The compute capabilities of the devices that torch sees here, ascending, such as 90 for 9.0."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return tuple(sorted({10 * major + minor for major, minor in found}))


@contextlib.contextmanager
def _no_torch_extension() -> Iterator[None]:
    """Keep the import of tvm_ffi from compiling an extension of torch, for the import alone.

    It does so where torch is too old (before 2.10) to exchange tensors through DLPack's C interface: half a minute of
    work, into a cache of its own that nobody guards. Without it tensors pass through Python, some microseconds slower.
    """
    switch = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    if "tvm_ffi" in sys.modules or switch in os.environ or not _torch_extension_wanted():
        yield
        return
    os.environ[switch] = "1"
    try:
        yield
    finally:
        del os.environ[switch]


def _torch_extension_wanted() -> bool:
    try:
        import torch
    except ImportError:
        return False
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return False
    return importlib.util.find_spec("torch_c_dlpack_ext") is None
