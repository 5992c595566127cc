"""The NCCL that torch has loaded, and nccl4py's binding of it: one library in the process, never a second one."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["load", "raw_stream", "refused", "version"]

# nccl4py's low-level module: it takes addresses as integers, and its import needs neither cuda-bindings nor a device.
_BINDING = "nccl.bindings.nccl"
_TORCH, _NCCL = "libtorch_cuda.so", "libnccl.so.2"
# NCCL's own variable, which would win over what a communicator asks for.
_BLOCKING = "NCCL_COMM_BLOCKING"


def load() -> Any:
    """nccl4py's low-level module, bound to torch's NCCL. Creates no CUDA context.

    Raises:
        ImportError: why it can't be had, in one sentence.
    """
    torchs = _version_function(_TORCH)
    if torchs is None:
        raise ImportError("torch has no NCCL: it isn't a build for CUDA, or one without NCCL")
    # What nccl4py looks for first; where it isn't there, it would load whichever it finds.
    if _version_function(_NCCL) != torchs:
        raise ImportError(f"torch's NCCL isn't this process's {_NCCL}, which nccl4py would bind")
    try:
        binding: Any = importlib.import_module(_BINDING)
    except ImportError as error:
        raise ImportError(f"nccl4py can't be imported: {error}") from error
    # Somebody else may have made it bind another one before.
    path = binding.get_library_path()
    if _version_function(path) != torchs:
        raise ImportError(f"nccl4py has bound another NCCL than torch's: {path}")
    return binding


def refused(environ: Mapping[str, str] | None = None) -> str:
    """What in the environment speaks against it; "" for nothing."""
    if (os.environ if environ is None else environ).get(_BLOCKING, "").strip() == "0":
        return f"{_BLOCKING}=0 makes NCCL start a thread for each call"
    return ""


def version(binding: Any) -> str:
    """NCCL's own version, such as "2.28.9"."""
    number = int(binding.get_version())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def raw_stream() -> Callable[[int], int]:
    """What tells a device's current stream as an integer, for a tenth of what the public way costs."""
    import torch

    function: Callable[[int], int] = torch._C._cuda_getCurrentRawStream  # noqa: SLF001 - torch's compiler generates calls of it
    return function


def _version_function(name: str) -> int | None:
    """Where `ncclGetVersion` is that a loaded library, or one that it needs, has; None where there is none."""
    try:
        library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
        return ctypes.cast(library.ncclGetVersion, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
