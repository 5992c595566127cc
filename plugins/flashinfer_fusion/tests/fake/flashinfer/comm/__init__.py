"""Checks, exchanges, references and frees what release 0.7.2 does; FAKE_MEMORY is the device's memory, in bytes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from flashinfer.comm import trtllm_ar

#: The bytes allocated now, the most bytes allocated so far, and the calls.
state: dict[str, Any] = {"live": 0, "peak": 0, "calls": []}


class AllReduceFusionPattern:
    kAllReduce = 0  # noqa: N815 - FlashInfer's names
    kARResidualRMSNorm = 1  # noqa: N815


class _Buffer:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = 0
        if state["live"] + nbytes > int(os.environ.get("FAKE_MEMORY") or 1 << 40):
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        self.nbytes = nbytes
        state["live"] += nbytes
        state["peak"] = max(state["peak"], state["live"])

    def __del__(self) -> None:
        state["live"] -= self.nbytes


def exchange_fds(comm: Any, local_fd: int) -> list[str]:
    """As in flashinfer.comm.fd_exchange: if it fails, the caller still owns the descriptor, and doesn't close it."""
    assert local_fd
    return comm.allgather(f"rank {comm.Get_rank()}/fd.sock")


class _Workspace:
    backend = "trtllm"

    def __init__(self, rank: int, size: int, numel: int, group: dist.ProcessGroup, comm: Any) -> None:
        assert (comm.Get_rank(), comm.Get_size()) == (rank, size)
        assert (dist.get_rank(group), dist.get_world_size(group)) == (rank, size)
        self.group = group
        self.numel = numel
        self.found: list[Any] = []
        buffers = []
        for nbytes in (size * numel * 2, size * 1024, 3 * size * numel * 2):
            # FlashInfer exchanges the paths of sockets, and on an NVLink fabric handles.
            buffers.append(_Buffer(nbytes))
            handle = os.open(os.devnull, os.O_RDONLY)
            self.found.append(exchange_fds(comm, handle))
            os.close(handle)
            self.found.append(comm.allgather(bytes([rank, 255, dist.get_rank()])))
            self.found.extend(comm.bcast(("root", dist.get_rank()), root=root) for root in range(size))
        self.ipc_handles = [[id(buffer)] for buffer in buffers]
        trtllm_ar._symm_workspace_refs[id(self.ipc_handles)] = buffers
        self._internal = (self.ipc_handles, buffers, _Buffer(20))
        comm.barrier()

    def destroy(self) -> None:
        del self.ipc_handles


def create_allreduce_fusion_workspace(
    backend: str = "auto",
    world_size: int = 0,
    rank: int = 0,
    max_token_num: int = 0,
    hidden_dim: int = 0,
    dtype: torch.dtype = torch.float16,
    gpus_per_node: int | None = None,
    comm_backend: Any = None,
    force_oneshot_support: bool = False,
    group: dist.ProcessGroup | None = None,
) -> _Workspace:
    assert backend == "trtllm", "any other backend uses multicast"
    assert world_size in (2, 4, 8, 16)
    assert dtype in (torch.float16, torch.bfloat16)
    assert group is not None
    state["calls"].append("create")
    return _Workspace(rank, world_size, max_token_num * hidden_dim, group, comm_backend)


def allreduce_fusion(
    input: torch.Tensor,  # noqa: A002 - the library's name
    workspace: _Workspace,
    pattern: int,
    launch_with_pdl: bool = False,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    weight_bias: float = 0.0,
) -> torch.Tensor:
    assert pattern == AllReduceFusionPattern.kARResidualRMSNorm
    assert hasattr(workspace, "ipc_handles"), "destroyed"
    assert use_oneshot
    assert fp32_acc
    num_tokens, hidden_size = input.shape
    assert num_tokens * hidden_size <= workspace.numel
    assert hidden_size % 8 == 0
    assert residual_in is not None
    assert rms_gamma is not None
    assert residual_out is not None
    assert norm_out is not None
    state["calls"].append((num_tokens, hidden_size))
    total = input.float()
    dist.all_reduce(total, group=workspace.group)
    # Rounded after the sum and after the residual, as in the real kernel.
    summed = (total.to(input.dtype).float() + residual_in.float()).to(input.dtype)
    wide = summed.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + rms_eps)
    norm_out.copy_(wide * scale * (weight_bias + rms_gamma.float()))
    residual_out.copy_(summed)
    return norm_out
