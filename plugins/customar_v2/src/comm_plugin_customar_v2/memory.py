"""Memory that all ranks of a group have mapped: torch's symmetric memory, behind one function."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Symmetric", "allocate"]

# Torch binds a multicast object to each buffer where there are such. Nothing here uses one, and NVSwitch has few.
_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_environment = threading.Lock()


class Symmetric:
    """A buffer of this rank's, and its peers' as this device sees them.

    Attributes:
        tensor: this rank's, of bytes.
        addresses: by rank; known once `exchange` has returned.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.addresses: tuple[int, ...] = ()
        self._handle: Any = None

    def exchange(self, group: dist.ProcessGroup) -> None:
        """Map every rank's buffer. Collective over the group's store.

        Raises:
            RuntimeError: the driver or torch refuses, or torch's interface isn't the one that is known.
        """
        from torch.distributed import _symmetric_memory as symmetric

        with _environment, _multicast_off():
            handle = symmetric.rendezvous(self.tensor, group)
        if handle is None:
            raise RuntimeError("torch's symmetric memory gave no handle for the buffer")
        # Of whole allocations, which `allocate` made these buffers.
        addresses = tuple(handle.buffer_ptrs)
        rank = dist.get_rank(group)
        if len(addresses) != dist.get_world_size(group) or addresses[rank] != self.tensor.data_ptr():
            raise RuntimeError(
                f"torch's symmetric memory maps rank {rank}'s buffer at {addresses}, not at {self.tensor.data_ptr()}"
            )
        self.addresses, self._handle = addresses, handle


def allocate(nbytes: int, device: torch.device) -> Symmetric:
    """A buffer of CUDA virtual memory that can be shared with other processes. Local.

    Not `torch.distributed._symmetric_memory.empty`: from torch 2.10 on it may take a part of a pool.
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
