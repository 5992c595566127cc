"""The object in a group's `ca_comm`, which SGLang takes for its custom all-reduce."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import comm_core as comm

__all__ = ["CommAllReduce", "subclass_of"]


class CommAllReduce:
    """Sums by a group's handle what SGLang would sum by its custom all-reduce.

    Models use SGLang's object for more: they send through its push buffers, or create another one for its group and
    device. This one has no buffers and says so, by which they do without, or create their own.

    Args:
        coordinator: the group of SGLang (`GroupCoordinator`).
        handle: the group's handle.

    Attributes:
        handle: as above.
        sums_cpu_tensors: whether the group's tensors are on CPUs.
        disabled: whether SGLang is to sum by other means; its graph runners set it for a while.
    """

    # Bytes, SGLang's default limit. Up to it, SGLang gathers decode batches of DP attention by an all-reduce of all
    # ranks' rows; above, by an all-gather, which sends less.
    max_size = 16 << 20
    max_pull_size = max_push_size = 0
    has_multicast = False

    def __init__(self, coordinator: Any, handle: comm.Backend) -> None:
        # Without the stock object's, which allocates buffers.
        self.handle = handle
        self.sums_cpu_tensors = handle.device.type == "cpu"
        self.disabled = self.original_disabled = False
        self.group, self.device = coordinator.cpu_group, coordinator.device
        self.rank, self.world_size = coordinator.rank_in_group, coordinator.world_size
        self.obj = SimpleNamespace(world_size=self.world_size, push=None, pull=None)
        self.config = SimpleNamespace(num_push_blocks=0, num_pull_blocks=0, num_mc_blocks=None)
        self._push_counter = torch.empty(0, dtype=torch.int32)
        self._device_group = coordinator.device_group

    def should_custom_ar(self, _input: torch.Tensor) -> bool:
        """Return whether `custom_all_reduce` takes a tensor: any, since what no backend serves goes to torch."""
        return not self.disabled

    def custom_all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the group, a new tensor with the strides that torch.compile expects."""
        # A handle allocates contiguous tensors.
        return self.handle.all_reduce(tensor, None if tensor.is_contiguous() else torch.empty_like(tensor))

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Let the backends of every group record captured calls. Collective, as SGLang's own is.

        Raises:
            CaptureError: as in `comm.capture()`.
        """
        from sglang.srt.environ import envs

        # Graphs that SGLang's memory saver moves: peers must not read their tensors. Outside of a capture, backends
        # use buffers of their own.
        if envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.get():
            yield
            return
        import comm_core as comm

        with comm.capture():
            yield

    def close(self) -> None:
        """Close the handle, which waits `COMM_CORE_CONTROL_TIMEOUT_S` at most for a peer."""
        import comm_core as comm

        self.disabled = True
        comm.close(self._device_group)

    def __del__(self) -> None:
        # The stock object's would close it, and wait for peers.
        pass

    def supports_push(self, **_need: int) -> bool:
        """Return False: there are no push buffers."""
        return False

    def uses_one_shot_push(self, _nbytes: int) -> bool:
        """Return False: there are no push buffers."""
        return False

    def uses_two_shot_push(self, _nbytes: int) -> bool:
        """Return False: there are no push buffers."""
        return False

    def reserve_push_capacity(self, _nbytes: int) -> None:
        """Do nothing: there are no push buffers."""


@functools.cache
def subclass_of(stock: Any) -> type[CommAllReduce]:
    """Return `CommAllReduce` as a subclass of SGLang's class, for which callers ask, or as it is without one."""
    return type("CommAllReduce", (CommAllReduce, stock), {}) if isinstance(stock, type) else CommAllReduce
