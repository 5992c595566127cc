"""Buffers that all ranks of a group map, for kernels that read and write their peers' memory.

```python
buffer = memory.share(64 << 20, context)           # in `connect`; every rank passes the same size
launch(list(buffer.addresses))                     # a kernel writes to buffer.addresses[peer]
buffer.suspend()                                   # in the hook `suspend`: gives the physical memory back
buffer.resume()                                    # in the hook `resume`: at the same addresses, initialised again
buffer.close()                                     # in the hook `close`
```

On GPUs a buffer is CUDA virtual memory, which `expandable_segments` and `CUDA_VISIBLE_DEVICES` don't affect. The ranks
pass it to each other as open files, over Unix sockets: they run on one machine, in one network namespace. Ranks on
several hosts of an NVLink clique pass fabric handles (`fabric=True`). On CPUs a buffer is a `memfd`.

Buffers on GPUs require the extra `memory` of comm-core.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from comm_core._memory.cpu import CpuMemory
from comm_core._memory.cuda import CudaMemory
from comm_core._memory.file_exchange import exchange_files
from comm_core.errors import CommError

if TYPE_CHECKING:
    from comm_core.context import GroupContext

__all__ = ["SharedBuffer", "missing", "share"]


def missing() -> str | None:
    """Return the reason why buffers on GPUs can't be shared by this process; None if nothing is known to be missing.

    Local and cheap. Meant for a plugin's `probe()`, as `comm_core.kernels.Library.missing`.
    """
    for distribution, module in (("cuda-bindings", "cuda.bindings"), ("numpy", "numpy")):
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):  # there is no package "cuda", or another one of that name
            found = None
        if not found:
            return f"{distribution} isn't installed (pip install 'comm-core[memory]')"
    return None


def share(
    nbytes: int,
    context: GroupContext,
    initialize: Callable[[torch.Tensor], object] = torch.Tensor.zero_,
    *,
    fabric: bool = False,
) -> SharedBuffer:
    """Allocate a buffer on every rank, and map all ranks' buffers on every rank. Collective.

    Call it in a Collective hook: its exchanges go through `context.control`. When it returns, every rank has mapped
    every buffer. If a rank fails, every rank raises, and no memory stays allocated or mapped.

    Args:
        nbytes: the size of this rank's buffer, at least 1; equal on all ranks.
        context: the group; `context.device` says where the memory is.
        initialize: writes the buffer's first contents to the tensor `[nbytes]` of uint8, before a peer can access it;
            also after each `resume`.
        fabric: whether the ranks may be on several hosts, all in one NVLink clique.

    Raises:
        ValueError: `nbytes` is less than 1, or differs between the ranks, or fabric handles are asked for on CPUs.
        ImportError: cuda-bindings isn't installed.
        OSError: the CPU's memory can't be allocated or mapped.
        RuntimeError: the driver refuses, or a peer's socket can't be reached.
        CommError: a peer failed, or didn't come in time.
    """
    if nbytes < 1:
        raise ValueError(f"nbytes={nbytes}: expected at least 1")
    if context.device.type == "cuda":
        return SharedBuffer(nbytes, context, initialize, CudaMemory(context.device, fabric=fabric))
    if fabric:
        raise ValueError(f"fabric=True: {context.device.type} memory has no fabric handles")
    return SharedBuffer(nbytes, context, initialize, CpuMemory())


class SharedBuffer:
    """This rank's buffer and its peers' buffers; `share` returns it. Not thread-safe.

    Attributes:
        nbytes: the size of each rank's buffer: at least what was asked for, in whole pages (2 MiB on GPUs).
        addresses: where this process maps each rank's buffer, by group rank; constant until `close`.
    """

    def __init__(
        self, nbytes: int, context: GroupContext, initialize: Callable[[torch.Tensor], object], memory: Any
    ) -> None:
        page = memory.granularity()
        self.nbytes = -(-nbytes // page) * page
        self.addresses: tuple[int, ...] = ()
        self._context = context
        self._initialize = initialize
        self._memory: CpuMemory | CudaMemory = memory
        self._mapped: list[int] = []
        try:
            for _ in range(context.world_size):
                self.addresses += (memory.reserve(self.nbytes),)
            self._allocate_and_map()
        except BaseException:
            with contextlib.suppress(OSError, RuntimeError):  # the first error is the one to raise
                self.close()
            raise

    @property
    def tensor(self) -> torch.Tensor:
        """This rank's buffer: uint8, `[nbytes]`. Don't use it after `suspend` or `close`: the memory is gone.

        Raises:
            CommError: the buffer is suspended or closed.
        """
        if not self._mapped:
            raise CommError("the buffer is suspended or closed: it has no memory")
        return self._memory.view(self.addresses[self._context.rank], self.nbytes)

    def suspend(self) -> None:
        """Give the memory back and keep the addresses. Local; no rank's kernels may use any of the buffers.

        The memory is free once every rank has suspended its buffer: until then a peer maps it. Idempotent.

        Raises:
            OSError, RuntimeError: a buffer can't be unmapped.
        """
        while self._mapped:
            self._memory.unmap(self._mapped[-1], self.nbytes)
            self._mapped.pop()

    def resume(self) -> None:
        """Allocate, initialise and map new memory at the same addresses. Collective; after every rank's `suspend`.

        Raises:
            CommError: the buffer is closed, or isn't suspended; a peer failed, or didn't come in time.
            OSError, RuntimeError: as in `share`. This rank's buffer is suspended again.
        """
        if self._mapped or not self.addresses:
            raise CommError(f"the buffer is {'in use' if self._mapped else 'closed'}: it can't be resumed")
        try:
            self._allocate_and_map()
        except BaseException:
            with contextlib.suppress(OSError, RuntimeError):  # the first error is the one to raise
                self.suspend()
            raise

    def close(self) -> None:
        """Give memory and addresses back. Local, idempotent; no rank's kernels may use any of the buffers.

        A peer may still map this rank's buffer: its memory is freed once the peer has unmapped it.

        Raises:
            OSError, RuntimeError: a buffer can't be unmapped.
        """
        self.suspend()
        while self.addresses:
            self._memory.free(self.addresses[-1], self.nbytes)
            self.addresses = self.addresses[:-1]

    def _allocate_and_map(self) -> None:
        """Take memory for this rank's buffer, exchange it with the peers, and map theirs. Collective."""
        memory, control = self._memory, self._context.control
        with contextlib.ExitStack() as stack:
            handle = memory.create(self.nbytes)
            stack.callback(memory.release, handle)
            self._map(self._context.rank, handle)
            self._initialize(self.tensor)
            memory.synchronize()
            shared = memory.export(handle)
            if isinstance(shared, int):
                stack.callback(os.close, shared)
            # From here on peers wait for this rank, so all that can fail on it alone comes before.
            fabric = shared.hex() if isinstance(shared, bytes) else None
            exported = control.all_gather([self.nbytes, fabric])
            sizes = [size for size, _ in exported]
            if len(set(sizes)) > 1:
                raise ValueError(f"the ranks asked for buffers of different sizes, in bytes by rank: {sizes}")
            if isinstance(shared, bytes):
                self._import_all({peer: bytes.fromhex(text) for peer, (_, text) in enumerate(exported)})
            else:
                self._import_all(stack.enter_context(exchange_files(shared, self._context)))
        control.barrier()

    def _import_all(self, exported: dict[int, Any]) -> None:
        """Map the peers' buffers from what they exported, by rank."""
        for peer, shared in exported.items():
            if peer != self._context.rank:
                handle = self._memory.import_(shared)
                try:
                    self._map(peer, handle)
                finally:
                    self._memory.release(handle)

    def _map(self, rank: int, handle: Any) -> None:
        self._memory.map(self.addresses[rank], self.nbytes, handle)
        self._mapped.append(self.addresses[rank])
