"""Peers from torch: its all-reduces over symmetric memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from comm_bench.cases import BenchCase
from comm_bench.contenders import Contender, Job, State
from comm_bench.symmetric import Symmetric, allocate

__all__ = ["peers"]

# The operators' own requirements; the size must be a multiple of the vector.
_DTYPES = ("bfloat16", "float32")
_VECTOR_NBYTES = 16


def peers(job: Job, ops: Iterable[str], capacity: int, hidden_size: int) -> list[tuple[str, Callable[[], Contender]]]:  # noqa: ARG001 - the same in every peer's module
    """Return the peers' names and factories; see `comm_bench.roster`."""
    if job.device.type != "cuda":
        return []
    return [
        ("torch_symm_1shot", lambda: _OneShot(job, capacity)),
        ("torch_symm_2shot", lambda: _TwoShot(job, capacity)),
    ]


class _Symmetric(Contender):
    """Base of both. They need symmetric memory, so a chain's buffers are there, which is their fastest setting."""

    place = "out"

    def __init__(self, name: str, job: Job, capacity: int, buffers: int) -> None:
        super().__init__(name)
        self._capacity = capacity
        self._group_name = job.world.group_name
        self._buffers: list[Symmetric] = [allocate(job, capacity) for _ in range(buffers)]
        self._views: tuple[torch.Tensor, ...] = ()
        self._ops: Any = torch.ops.symm_mem

    def supports(self, case: BenchCase) -> bool:
        return (
            case.op == "all_reduce"
            and case.device_type == "cuda"
            and case.place == self.place
            and case.dtype in _DTYPES
            and case.nbytes % _VECTOR_NBYTES == 0
            and case.nbytes <= self._capacity
        )

    def inputs(self, case: BenchCase) -> State:
        dtype = getattr(torch, case.dtype)
        self._views = tuple(buffer.own[: case.nbytes].view(dtype).view(case.shape) for buffer in self._buffers)
        return self._views[:1]

    def close(self) -> None:
        self._views = ()
        self._buffers.clear()


class _OneShot(_Symmetric):
    """Each rank reads all inputs; a chain alternates between two symmetric buffers."""

    def __init__(self, job: Job, capacity: int) -> None:
        super().__init__("torch_symm_1shot", job, capacity, 2)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - plain, in one place only
        out = self._views[1] if state[0] is self._views[0] else self._views[0]
        self._ops.one_shot_all_reduce_out(state[0], "sum", self._group_name, out)
        return (out,)


class _TwoShot(_Symmetric):
    """Each rank sums a part and writes it to all ranks; in place."""

    place = "in"

    def __init__(self, job: Job, capacity: int) -> None:
        super().__init__("torch_symm_2shot", job, capacity, 1)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - plain, in one place only
        self._ops.two_shot_all_reduce_(state[0], "sum", self._group_name)
        return state
