"""The NCCL that torch has loaded, bound by nccl4py: one NCCL in the process, never a second."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["current_stream_function", "load", "unfit_environment", "version"]

# nccl4py's low-level module: it takes addresses as integers, and its import needs neither cuda-bindings nor a device.
_BINDING = "nccl.bindings.nccl"
_TORCH, _NCCL = "libtorch_cuda.so", "libnccl.so.2"
# NCCL's own variable, which overrides a communicator's configuration.
_BLOCKING = "NCCL_COMM_BLOCKING"


def load() -> Any:
    """Import nccl4py's low-level module, bound to torch's NCCL. Creates no CUDA context.

    Raises:
        ImportError: the reason why it can't be used, one sentence without a full stop.
    """
    in_torch = _version_function(_TORCH)
    if in_torch is None:
        raise ImportError("torch has no NCCL: it was built without CUDA, or without NCCL")
    # nccl4py binds the loaded library of this name. If there were none, it would load a second NCCL.
    if _version_function(_NCCL) != in_torch:
        raise ImportError(f"torch's NCCL isn't this process's {_NCCL}, which nccl4py would bind")
    try:
        binding: Any = importlib.import_module(_BINDING)
    except ImportError as error:
        raise ImportError(f"nccl4py can't be imported: {error}") from error
    # Other code may have made it bind another library before.
    path = binding.get_library_path()
    if _version_function(path) != in_torch:
        raise ImportError(f"nccl4py has bound another NCCL than torch's: {path}")
    return binding


def unfit_environment(environ: Mapping[str, str] | None = None) -> str:
    """Say which environment variable makes this backend too slow; "" if none does."""
    if (os.environ if environ is None else environ).get(_BLOCKING, "").strip() == "0":
        return f"{_BLOCKING}=0 makes NCCL start a thread for each call: unset it"
    return ""


def version(binding: Any) -> str:
    """Return NCCL's version, such as "2.28.9"."""
    number = int(binding.get_version())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def current_stream_function() -> Callable[[int], int]:
    """Return a function from a device's index to its current stream as an integer.

    A call takes a tenth of the time of `torch.cuda.current_stream`.
    """
    import torch

    function: Callable[[int], int] = torch._C._cuda_getCurrentRawStream  # noqa: SLF001 - torch's compiler generates calls of it
    return function


def _version_function(name: str) -> int | None:
    """Return the address of `ncclGetVersion` in a loaded library or its dependencies; None if there is none."""
    try:
        library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
        return ctypes.cast(library.ncclGetVersion, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
