"""A peer: NCCL through nccl4py's low-level binding, the shortest call path in Python."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from comm_bench.backends import nccl_needs_spacer
from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent, Contender, Job, State

__all__ = ["peers"]

# `ncclDataType_t` and `ncclSum` in nccl.h.
_CODES = {
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "int64": 4,
    "float16": 6,
    "float32": 7,
    "float64": 8,
    "bfloat16": 9,
}
_SUM = 0


def peers(job: Job, ops: Iterable[str], capacity: int, hidden_size: int) -> list[tuple[str, Callable[[], Contender]]]:  # noqa: ARG001 - the same in every peer's module
    """Return the peer's name and factory; see `comm_bench.roster`."""
    if job.device.type != "cuda" or "all_reduce" not in ops:
        return []
    return [("nccl_raw", lambda: _Raw(job))]


class _Raw(Contender):
    """Calls `ncclAllReduce` with a communicator of its own; out of place it alternates between two buffers.

    The communicator isn't destroyed: NCCL would wait for all graphs that recorded its calls, and the process ends soon.
    """

    def __init__(self, job: Job) -> None:
        super().__init__("nccl_raw")
        binding, missing = _binding()
        identity = bytes(binding.get_unique_id()).hex() if binding is not None and job.rank == 0 else ""
        # Exchange failures first, because NCCL's initialisation waits for all ranks.
        ranks = job.all_gather((missing, identity))
        for rank, (reason, _) in enumerate(ranks):
            if reason:
                raise Absent(f"rank {rank}: {reason}")
        self._all_reduce: Callable[..., object] = binding.all_reduce
        self._communicator = binding.comm_init_rank(job.world_size, bytearray.fromhex(ranks[0][1]), job.rank)
        self._stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream  # noqa: SLF001 - as torch's compiler does
        self._index: Any = job.device.index
        self._views: State = ()
        self._code = 0

    def supports(self, case: BenchCase) -> bool:
        return case.op == "all_reduce" and case.device_type == "cuda" and case.dtype in _CODES

    def needs_spacer(self, case: BenchCase) -> bool:
        return nccl_needs_spacer(case)

    def inputs(self, case: BenchCase) -> State:
        self._views = self.allocate(case, 2)
        self._code = _CODES[case.dtype]
        return self._views[:1]

    def release(self) -> None:
        super().release()
        self._views = ()

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - plain only
        tensor = state[0]
        out = tensor if in_place else self._views[tensor is self._views[0]]
        self._all_reduce(
            tensor.data_ptr(),
            out.data_ptr(),
            tensor.numel(),
            self._code,
            _SUM,
            self._communicator,
            self._stream(self._index),
        )
        return (out,)


def _binding() -> tuple[Any, str]:
    """Return nccl4py's module, or the reason that it can't be imported."""
    try:
        binding: Any = importlib.import_module("nccl.bindings.nccl")
        binding.get_version()
    except Exception as error:  # noqa: BLE001 - other libraries' code may raise anything; its row is left out
        return None, f"nccl4py can't be imported: {error}"
    return binding, ""
