"""vLLM's communicator on CPUs, with all-reduces by comm-core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from comm_vllm import compiled
from comm_vllm.communicator import CommCommunicator
from comm_vllm.groups import get_handle

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = ["CommCpuCommunicator"]


class CommCpuCommunicator(CommCommunicator, CpuCommunicator):  # type: ignore[misc]
    """vLLM's communicator on CPUs; everything but `all_reduce` is vLLM's own."""

    def __init__(
        self,
        cpu_group: dist.ProcessGroup,
        device: torch.device | None = None,
        device_group: dist.ProcessGroup | None = None,
        unique_name: str = "",
        **options: Any,
    ) -> None:
        super().__init__(cpu_group, device, device_group, unique_name, **options)
        self.handle = get_handle(unique_name, cpu_group, device_group)
        if self.handle is not None:
            # torch.compile traces this method here, because on CPUs vLLM doesn't hide it in an operator.
            compiled.distinguish(unique_name, "all_reduce", self.handle.group_name)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the group in place, as vLLM's own does, and return it."""
        if self.handle is None:
            stock: torch.Tensor = super().all_reduce(input_)
            return stock
        return self.handle.all_reduce(input_, input_)
