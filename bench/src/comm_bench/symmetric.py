"""Torch's symmetric memory: a buffer on each rank's GPU that kernels of the other ranks can address."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from comm_bench.contenders import Absent, Job

__all__ = ["Symmetric", "allocate"]


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """A buffer of the same size on every rank.

    Attributes:
        own: this rank's buffer, uint8.
        addresses: each rank's buffer's address in this process, by rank.
        handle: torch's handle.
    """

    own: torch.Tensor
    addresses: tuple[int, ...]
    handle: Any

    def buffer(self, rank: int, nbytes: int) -> torch.Tensor:
        """Return the first bytes of a rank's buffer, as a uint8 tensor."""
        view: torch.Tensor = self.handle.get_buffer(rank, (nbytes,), torch.uint8)
        return view


def allocate(job: Job, nbytes: int) -> Symmetric:
    """Allocate a buffer on every rank and exchange the addresses. Collective.

    Raises:
        Absent: this release of torch, or the devices, don't support symmetric memory.
    """
    if job.device.type != "cuda":
        raise Absent("symmetric memory needs GPUs")
    try:
        # A private module, but the only one in all releases; the public functions of later releases come from it.
        import torch.distributed._symmetric_memory as symmetric_memory

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, because not needed, from torch 2.9 on
            symmetric_memory.enable_symm_mem_for_group(job.world.group_name)
        own = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=job.device)
        handle = symmetric_memory.rendezvous(own, job.world.group_name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise Absent(f"no symmetric memory: {error}") from error
    own.zero_()
    torch.cuda.synchronize(job.device)
    return Symmetric(own, tuple(handle.buffer_ptrs), handle)
