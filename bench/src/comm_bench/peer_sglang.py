"""Peers from SGLang: its second version of custom all-reduce, and its fused kernel, called as SGLang calls them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent, Contender, Job, State
from comm_bench.symmetric import allocate

__all__ = ["peers"]

_MODULE = "sglang.kernels.ops.communication.all_reduce"
_FUSED_MODULE = "sglang.kernels.ops.communication.all_reduce_fusion"
_DTYPES = ("bfloat16", "float16", "float32")
_VECTOR_NBYTES = 16
# SGLang's default for the largest eager push between two ranks on Hopper; it sends larger messages by pull.
_MAX_PUSH_NBYTES = 32 << 20
# Bytes of a block's semaphores and of its counter; blocks of a pull on Hopper; rows of the table of graph inputs.
_SEMAPHORE_NBYTES = 128
_COUNTER_NBYTES = 4
_PULL_BLOCKS = 64
_GRAPH_INPUTS = 131072


def peers(job: Job, ops: Iterable[str], capacity: int, hidden_size: int) -> list[tuple[str, Callable[[], Contender]]]:  # noqa: ARG001 - the same in every peer's module
    """Return the peers' names and factories; see `comm_bench.roster`."""
    if job.device.type != "cuda":
        return []
    shared: list[_Planes] = []

    def planes() -> _Planes:
        if not shared:
            shared.append(_Planes(job, capacity))
        return shared[0]

    found: list[tuple[str, Callable[[], Contender]]] = []
    if "all_reduce" in ops:
        found += [
            ("sglang_1shot_push", lambda: _Push(planes(), "1shot_push")),
            ("sglang_2shot_push", lambda: _Push(planes(), "2shot_push")),
            ("sglang_1shot_pull", lambda: _Pull(planes(), "1shot_pull")),
            ("sglang_2shot_pull", lambda: _Pull(planes(), "2shot_pull")),
        ]
    if "all_reduce_add_rms_norm" in ops:
        found.append(("sglang_fused", lambda: _Fused(planes())))
    return found


class _Planes:
    """The symmetric memory and counters of SGLang's algorithms, sized for the largest message."""

    def __init__(self, job: Job, capacity: int) -> None:
        try:
            api = self.api = importlib.import_module(_MODULE)
        except ImportError as error:
            raise Absent(f"sglang can't be imported: {error}") from error
        self.job = job
        self.capacity = -(-capacity // 1024) * 1024
        world_size = job.world_size
        self.slot = min(self.capacity, _MAX_PUSH_NBYTES)
        pushed = 2 * world_size * self.slot
        blocks = torch.cuda.get_device_properties(job.device).multi_processor_count
        self._memory = allocate(job, pushed + self.capacity + _SEMAPHORE_NBYTES * _PULL_BLOCKS)
        job.barrier()  # a peer's first push must find zeros
        slabs = [self._memory.buffer(rank, self._memory.own.nbytes) for rank in range(world_size)]

        def part(offset: int, *shape: int) -> list[torch.Tensor]:
            length = shape[0] * (shape[1] if len(shape) > 1 else 1)
            return [slab[offset : offset + length].view(shape) for slab in slabs]

        self._counter = torch.zeros((blocks, _COUNTER_NBYTES), dtype=torch.uint8, device=job.device)
        push = api.PushPlane(job.rank, world_size, workspaces=part(0, 2 * world_size, self.slot), counter=self._counter)
        pull = api.PullPlane(
            job.rank,
            world_size,
            workspaces=part(pushed, self.capacity),
            semaphores=part(pushed + self.capacity, _PULL_BLOCKS, _SEMAPHORE_NBYTES),
        )
        self.communicator = api.Communicator(push=push, pull=pull)
        self.inputs = _GraphInputs(job, api)
        job.barrier()

    def module(self, dtype: str) -> Any:
        """Return SGLang's kernels for a dtype; the first call compiles them."""
        return self.api.get_all_reduce_module(getattr(torch, dtype), self.job.world_size)


class _GraphInputs:
    """The addresses of a graph's inputs on all ranks, exchanged after its capture."""

    def __init__(self, job: Job, api: Any) -> None:
        self._job = job
        self._manager = api.IPCManager()
        self._table = torch.zeros((_GRAPH_INPUTS, job.world_size), dtype=torch.uint64, device=job.device)
        self._used = 0
        self._new: list[int] = []

    def row(self, address: int) -> torch.Tensor:
        """Return the row of the table that the next recorded call reads."""
        self._new.append(address)
        return self._table[self._used + len(self._new) - 1]

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """Fill the new rows after a capture. Collective."""
        yield
        handles = [(list(handle), int(offset)) for handle, offset in self._manager.batch_get_handles(self._new)]
        addresses = [
            self._new if rank == self._job.rank else list(self._manager.batch_open_handles(theirs))
            for rank, theirs in enumerate(self._job.all_gather(handles))
        ]
        if self._new:
            rows = torch.tensor(list(zip(*addresses, strict=True)), dtype=torch.uint64, device=self._job.device)
            self._table[self._used : self._used + len(self._new)].copy_(rows)
            torch.cuda.synchronize(self._job.device)
        self._used += len(self._new)
        self._new = []


class _Push(Contender):
    """Pushes, out of place. As in SGLang, an eager call validates the tensor and looks up its launch plan."""

    def __init__(self, planes: _Planes, algorithm: str) -> None:
        super().__init__(f"sglang_{algorithm}")
        self._planes = planes
        self._algorithm = algorithm
        # By bytes and dtype: the module, the algorithm, and whether it multicasts.
        self._plans: dict[tuple[int, torch.dtype], tuple[Any, str, bool]] = {}
        planes.module("bfloat16")

    def supports(self, case: BenchCase) -> bool:
        return _fits(case, self._planes.slot) and case.place == "out"

    def inputs(self, case: BenchCase) -> State:
        plan = self._planes.module(case.dtype), self._algorithm, False
        self._plans[case.nbytes, getattr(torch, case.dtype)] = plan
        return super().inputs(case)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - plain and out of place only
        module, algorithm, multicast = self._plan(state[0])
        return (module.all_reduce(self._planes.communicator, state[0], algorithm, None, multicast),)

    def _plan(self, tensor: torch.Tensor) -> tuple[Any, str, bool]:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes % _VECTOR_NBYTES or not tensor.is_contiguous():
            raise ValueError(
                f"SGLang needs a contiguous tensor of a multiple of {_VECTOR_NBYTES} bytes; got {nbytes} bytes"
            )
        return self._plans[nbytes, tensor.dtype]


class _Pull(_Push):
    """Pulls from a staging buffer in eager mode, from the inputs themselves in a graph; two-shot is then in place."""

    def supports(self, case: BenchCase) -> bool:
        place = "in" if case.mode == "graph" and self._algorithm == "2shot_pull" else "out"
        return _fits(case, self._planes.capacity) and case.place == place

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        if not torch.cuda.is_current_stream_capturing():
            if not in_place:
                return super().call(state, weight, in_place=in_place)
            # A warm-up call. The in-place plan exists in graphs only.
            return (state[0].copy_(super().call(state, weight, in_place=False)[0]),)
        row = self._planes.inputs.row(state[0].data_ptr())
        module, algorithm, multicast = self._plan(state[0])
        out = module.all_reduce(self._planes.communicator, state[0], algorithm, row, multicast)
        return state if in_place else (out,)

    def capture(self) -> AbstractContextManager[None]:
        return self._planes.inputs.registered()


class _Fused(Contender):
    """All-reduce, residual and norm in one kernel; bfloat16, at most one token per block."""

    def __init__(self, planes: _Planes) -> None:
        super().__init__("sglang_fused")
        try:
            self._api: Any = importlib.import_module(_FUSED_MODULE)
        except ImportError as error:
            raise Absent(f"sglang can't be imported: {error}") from error
        self._planes = planes
        self._api.register_comm(planes.communicator)
        self._tokens = torch.cuda.get_device_properties(planes.job.device).multi_processor_count

    def supports(self, case: BenchCase) -> bool:
        return (
            case.op == "all_reduce_add_rms_norm"
            and case.device_type == "cuda"
            and case.dtype == "bfloat16"
            and case.shape[0] <= self._tokens
            and case.nbytes <= self._planes.slot
            and bool(self._api.valid_cluster_sizes(case.shape[1]))
        )

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        tensor, residual = state
        residual_out = residual if in_place else torch.empty_like(residual)
        normed, summed = self._api.all_reduce_residual_norm(
            tensor, residual, weight, 1e-6, world_size=self._planes.job.world_size, residual_out=residual_out
        )
        return normed, summed


def _fits(case: BenchCase, max_nbytes: int) -> bool:
    return (
        case.op == "all_reduce"
        and case.device_type == "cuda"
        and case.dtype in _DTYPES
        and case.nbytes % _VECTOR_NBYTES == 0
        and case.nbytes <= max_nbytes
    )
