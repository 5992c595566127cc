"""Peers from FlashInfer: its copy of vLLM's first custom all-reduce, and its fused kernels from TensorRT-LLM."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent, Contender, Job, State

__all__ = ["peers"]

_DTYPES = ("bfloat16", "float16", "float32")
_VECTOR_NBYTES = 16
_V1_WORLD_SIZES = (2, 4, 6, 8)
# vLLM's settings: the greatest number of blocks, and the bytes for the table of registered addresses.
_V1_BLOCKS = 36
_V1_TABLE_NBYTES = 8 << 20
_FUSED_DTYPES = ("bfloat16", "float16")
# FlashInfer's codes for the patterns all-reduce, residual, norm, and that quantised. Its scales for groups are powers
# of two: another format than core's.
_AR_RESIDUAL_RMS_NORM = 1
_QUANT_PATTERNS = {"fp8_static": 2, "fp8_per_token": 10}


def peers(job: Job, ops: Iterable[str], capacity: int, hidden_size: int) -> list[tuple[str, Callable[[], Contender]]]:
    """Return the peers' names and factories; see `comm_bench.roster`."""
    if job.device.type != "cuda":
        return []
    found: list[tuple[str, Callable[[], Contender]]] = []
    if "all_reduce" in ops:
        found.append(("vllm_v1", lambda: _V1(job, capacity)))
    if any(op != "all_reduce" for op in ops):
        shared: list[_Workspace] = []

        def workspace() -> _Workspace:
            if not shared:
                shared.append(_Workspace(job, capacity, hidden_size))
            return shared[0]

        found += [
            ("flashinfer_1shot", lambda: _Fused(workspace(), one_shot=True)),
            ("flashinfer_2shot", lambda: _Fused(workspace(), one_shot=False)),
        ]
    return found


def _package() -> Any:
    try:
        return importlib.import_module("flashinfer.comm")
    except ImportError as error:
        raise Absent(f"flashinfer can't be imported: {error}") from error


class _V1(Contender):
    """vLLM's kernel, which reads over CUDA IPC: a staging buffer in eager mode, the inputs themselves in a graph."""

    def __init__(self, job: Job, capacity: int) -> None:
        super().__init__("vllm_v1")
        if job.world_size not in _V1_WORLD_SIZES:
            raise Absent(f"it supports 2, 4, 6 or 8 ranks, and there are {job.world_size}")
        self._api = _package()
        self._job = job
        self._capacity = capacity
        signals = self._api.vllm_meta_size() + capacity
        self._shared = [self._api.create_shared_buffer(nbytes) for nbytes in (signals, capacity)]
        self._api.CudaRTLibrary().cudaMemset(ctypes.c_void_p(self._shared[0][job.rank]), 0, signals)
        torch.cuda.synchronize(job.device)
        job.barrier()
        table = torch.empty(_V1_TABLE_NBYTES, dtype=torch.uint8, device=job.device)
        self._table = table
        self._session = self._api.vllm_init_custom_ar(self._shared[0], table, job.rank, True)
        self._api.vllm_register_buffer(self._session, self._shared[1])

    def supports(self, case: BenchCase) -> bool:
        return (
            case.op == "all_reduce"
            and case.device_type == "cuda"
            and case.place == "out"
            and case.dtype in _DTYPES
            and case.nbytes % _VECTOR_NBYTES == 0
            and case.nbytes <= self._capacity
        )

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - plain and out of place only
        out = torch.empty_like(state[0])
        staging, nbytes = self._shared[1][self._job.rank], self._capacity
        if torch.cuda.is_current_stream_capturing():
            staging, nbytes = 0, 0
        self._api.vllm_all_reduce(self._session, state[0], out, staging, nbytes, _V1_BLOCKS)
        return (out,)

    @contextlib.contextmanager
    def _registered(self) -> Iterator[None]:
        yield
        handles, offsets = self._api.vllm_get_graph_buffer_ipc_meta(self._session)
        everyone = self._job.all_gather((list(handles), list(offsets)))
        self._api.vllm_register_graph_buffers(
            self._session, [theirs for theirs, _ in everyone], [theirs for _, theirs in everyone]
        )

    def capture(self) -> AbstractContextManager[None]:
        return self._registered()

    def close(self) -> None:
        self._api.vllm_dispose(self._session)
        for pointers in self._shared:
            self._api.free_shared_buffer(pointers)


class _Workspace:
    """The memory of FlashInfer's fused kernels."""

    def __init__(self, job: Job, capacity: int, hidden_size: int) -> None:
        self.api = _package()
        self.module: Any = importlib.import_module("flashinfer.comm.allreduce")
        mnnvl: Any = importlib.import_module("flashinfer.comm.mnnvl")
        self.world_size = job.world_size
        self.capacity = capacity
        self.value = self.module.create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=job.world_size,
            rank=job.rank,
            max_token_num=-(-capacity // (2 * hidden_size)),
            hidden_dim=hidden_size,
            dtype=torch.bfloat16,
            comm_backend=mnnvl.TorchDistBackend(),
        )


class _Fused(Contender):
    """All-reduce, residual and norm in one kernel, and the quantisation with one scale or one for each token."""

    def __init__(self, workspace: _Workspace, *, one_shot: bool) -> None:
        super().__init__("flashinfer_1shot" if one_shot else "flashinfer_2shot")
        self._workspace = workspace
        self._one_shot = one_shot

    def supports(self, case: BenchCase) -> bool:
        workspace = self._workspace
        return (
            case.fused
            and (case.quant is None or case.quant in _QUANT_PATTERNS)
            and case.device_type == "cuda"
            and case.dtype in _FUSED_DTYPES
            and case.nbytes <= workspace.capacity
            # The two-shot kernel distributes the tokens over the ranks.
            and (self._one_shot or case.shape[0] > workspace.world_size)
        )

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        tensor, residual = state
        normed = torch.empty_like(tensor)
        summed = residual if in_place else torch.empty_like(residual)
        self._run(_AR_RESIDUAL_RMS_NORM, tensor, residual, weight, summed, norm_out=normed)
        return normed, summed

    def call_quant(
        self, state: State, weight: torch.Tensor, quant: str, scale: torch.Tensor | None, *, in_place: bool
    ) -> State:
        tensor, residual = state
        values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
        summed = residual if in_place else torch.empty_like(residual)
        if scale is None:
            scales = torch.empty((len(tensor), 1), dtype=torch.float32, device=tensor.device)
            self._run(_QUANT_PATTERNS[quant], tensor, residual, weight, summed, quant_out=values, scale_out=scales)
            return values, scales, summed
        self._run(_QUANT_PATTERNS[quant], tensor, residual, weight, summed, quant_out=values, scale_factor=scale)
        return values, scale, summed

    def _run(
        self,
        pattern: int,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        summed: torch.Tensor,
        **outputs: torch.Tensor,
    ) -> None:
        self._workspace.module.allreduce_fusion(
            tensor,
            self._workspace.value,
            pattern,
            launch_with_pdl=True,
            residual_out=summed,
            residual_in=residual,
            rms_gamma=weight,
            rms_eps=1e-6,
            use_oneshot=self._one_shot,
            fp32_acc=True,
            **outputs,
        )
