"""Symmetric memory: a buffer on each rank's GPU that the others' kernels can address, by torch."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from comm_bench.contenders import Absent, Job

__all__ = ["Symmetric", "allocate"]


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """A buffer of one size on every rank.

    Attributes:
        own: this rank's, uint8.
        addresses: of every rank's, as this process addresses it, by rank.
        handle: torch's.
    """

    own: torch.Tensor
    addresses: tuple[int, ...]
    handle: Any

    def of(self, rank: int, nbytes: int) -> torch.Tensor:
        """The first bytes of a rank's buffer, as a uint8 tensor."""
        view: torch.Tensor = self.handle.get_buffer(rank, (nbytes,), torch.uint8)
        return view


def allocate(job: Job, nbytes: int) -> Symmetric:
    """Allocate and exchange. Collective.

    Raises:
        Absent: this torch has none, or not between these devices.
    """
    if job.device.type != "cuda":
        raise Absent("symmetric memory is for GPUs")
    try:
        # Private, and the one way to it: the public functions of later releases are this module's.
        import torch.distributed._symmetric_memory as symmetric_memory

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from torch 2.9 on this is deprecated, since it isn't needed
            symmetric_memory.enable_symm_mem_for_group(job.world.group_name)
        own = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=job.device)
        handle = symmetric_memory.rendezvous(own, job.world.group_name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise Absent(f"no symmetric memory: {error}") from error
    own.zero_()
    torch.cuda.synchronize(job.device)
    return Symmetric(own, tuple(handle.buffer_ptrs), handle)
