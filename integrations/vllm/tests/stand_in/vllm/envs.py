from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    VLLM_ALLREDUCE_USE_FLASHINFER: bool = True
    VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC: bool = False
    VLLM_ALLREDUCE_USE_SYMM_MEM: bool = True
    VLLM_BATCH_INVARIANT: bool = False


def _switch(name: str, default: str) -> Callable[[], object]:
    return lambda: os.environ.get(name, default) == "1"


environment_variables: dict[str, Callable[[], object]] = {
    "VLLM_ALLREDUCE_USE_FLASHINFER": _switch("VLLM_ALLREDUCE_USE_FLASHINFER", "1"),
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC": _switch("VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC", "0"),
    "VLLM_ALLREDUCE_USE_SYMM_MEM": _switch("VLLM_ALLREDUCE_USE_SYMM_MEM", "1"),
    "VLLM_BATCH_INVARIANT": _switch("VLLM_BATCH_INVARIANT", "0"),
}


def __getattr__(name: str):
    if name in environment_variables:
        return environment_variables[name]()
    raise AttributeError(name)


def compile_factors() -> dict[str, object]:
    return {name: read() for name, read in environment_variables.items()}
