"""Buffers that all ranks of a group map: torch's symmetric memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Symmetric", "allocate"]

# If the hardware has multicast, torch binds a multicast object to each buffer. Nothing here uses one, and an NVSwitch
# has few.
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_environment_lock = threading.Lock()


class Symmetric:
    """This rank's buffer, and its peers' buffers as mapped on this device.

    Attributes:
        tensor: this rank's buffer, as bytes.
        addresses: the address of each rank's buffer, by rank; empty until `exchange` has returned.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.addresses: tuple[int, ...] = ()
        self._handle: Any = None

    def exchange(self, group: dist.ProcessGroup) -> None:
        """Map every rank's buffer. Collective over the group's store.

        Raises:
            RuntimeError: the driver or torch refuses, or torch maps the buffers differently from what is expected here.
        """
        from torch.distributed import _symmetric_memory as symmetric

        with _environment_lock, _multicast_off():
            handle = symmetric.rendezvous(self.tensor, group)
        if handle is None:
            raise RuntimeError("torch's symmetric memory returned no handle for the buffer")
        # `buffer_ptrs` are the addresses of whole allocations, and `allocate` makes a buffer a whole allocation.
        addresses = tuple(handle.buffer_ptrs)
        rank = dist.get_rank(group)
        if len(addresses) != dist.get_world_size(group) or addresses[rank] != self.tensor.data_ptr():
            raise RuntimeError(
                f"torch's symmetric memory maps rank {rank}'s buffer at {addresses}, not at {self.tensor.data_ptr()}"
            )
        self.addresses, self._handle = addresses, handle


def allocate(nbytes: int, device: torch.device) -> Symmetric:
    """Allocate a buffer of CUDA virtual memory that other processes can map. Local.

    Not by `torch.distributed._symmetric_memory.empty`: from torch 2.10 on it may return a part of a pool.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    return Symmetric(_SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device))


@contextlib.contextmanager
def _multicast_off() -> Iterator[None]:
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before
