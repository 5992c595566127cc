"""vLLM's communicator on NVIDIA's GPUs, with all-reduces by comm-core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

from comm_vllm import compiled
from comm_vllm.capture import CapturePoint
from comm_vllm.communicator import CommCommunicator
from comm_vllm.groups import get_handle

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["CommCudaCommunicator"]

# Variables of vLLM that make its communicator allocate buffers for all-reduces alone.
_BUFFERS = (
    "VLLM_ALLREDUCE_USE_FLASHINFER",
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC",
    "VLLM_ALLREDUCE_USE_SYMM_MEM",
)


class CommCudaCommunicator(CommCommunicator, CudaCommunicator):  # type: ignore[misc]
    """vLLM's communicator on NVIDIA's GPUs; everything but `all_reduce` and its graph captures is vLLM's own.

    Attributes:
        ca_comm: the object that vLLM's captures of graphs enter.
    """

    ca_comm: Any

    def __init__(
        self,
        cpu_group: dist.ProcessGroup,
        device: torch.device | None = None,
        device_group: dist.ProcessGroup | None = None,
        unique_name: str = "",
        *more: Any,
        **options: Any,
    ) -> None:
        # First, because vLLM needs its own buffers only without a handle.
        handle = get_handle(unique_name, cpu_group, device_group)
        keeps_custom = os.environ.get("COMM_VLLM_KEEP_CUSTOM", "0").strip() == "1"
        with _without_buffers(keeps_custom=keeps_custom) if handle is not None else contextlib.nullcontext():
            super().__init__(cpu_group, device, device_group, unique_name, *more, **options)
        self.handle = handle
        if handle is not None:
            config = get_current_vllm_config_or_none()
            self.ca_comm = CapturePoint(self.ca_comm, config)
            if unique_name.startswith("tp:") and config is not None and compiled.fuses(config):
                # The plain all-reduces in compiled graphs are operators of vLLM's own.
                compiled.distinguish(unique_name, "all_reduce_add_rms_norm", handle.group_name)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the group, a new tensor with the strides that torch.compile expects."""
        if self.handle is None:
            stock: torch.Tensor = super().all_reduce(input_)
            return stock
        # A handle allocates contiguous tensors.
        return self.handle.all_reduce(input_, None if input_.is_contiguous() else torch.empty_like(input_))


@contextlib.contextmanager
def _without_buffers(*, keeps_custom: bool) -> Iterator[None]:
    """Make vLLM's communicator allocate no buffers for its own all-reduces.

    Args:
        keeps_custom: let it allocate those of its custom all-reduce, which also gathers and scatters.
    """
    stock_custom = parallel_state._ENABLE_CUSTOM_ALL_REDUCE  # noqa: SLF001 - vLLM's setter is for its command line
    # vLLM reads its variables as attributes of this module, which a real attribute hides.
    hidden = {name: vars(envs)[name] for name in _BUFFERS if name in vars(envs)}
    parallel_state._ENABLE_CUSTOM_ALL_REDUCE = stock_custom and keeps_custom  # noqa: SLF001
    vars(envs).update(dict.fromkeys(_BUFFERS, False))
    try:
        yield
    finally:
        parallel_state._ENABLE_CUSTOM_ALL_REDUCE = stock_custom  # noqa: SLF001
        for name in _BUFFERS:
            del vars(envs)[name]
        vars(envs).update(hidden)
