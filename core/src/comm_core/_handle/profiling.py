"""Ranges for profilers around each call of a backend, with `COMM_CORE_PROFILE`: torch's profiler, and NVTX on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["profiled"]


def profiled(function: Callable[..., Any], op: str, backend: str, title: str) -> Callable[..., Any]:
    """Return a function that calls a hook within a range such as "comm_core.all_reduce, shm, 4096 B, group 'tp'".

    Args:
        function: the hook, or the function of the terminal fallback.
        op: the operation.
        backend: the backend's name.
        title: the group's name.
    """
    head, tail = f"comm_core.{op}, {backend}, ", f" B, {title}"

    def call(session: Any, tensor: torch.Tensor, *rest: Any) -> Any:
        name = f"{head}{tensor.nbytes}{tail}"
        if not tensor.is_cuda:
            with torch.profiler.record_function(name):
                return function(session, tensor, *rest)
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            with torch.profiler.record_function(name):
                return function(session, tensor, *rest)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    return call
