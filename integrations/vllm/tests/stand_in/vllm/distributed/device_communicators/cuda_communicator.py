from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup

import vllm.envs as envs
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

StatelessProcessGroup = Any


class CustomAllreduce:
    """The stock object in `ca_comm`; `events` is its communicator's."""

    disabled = False
    fully_connected = True

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def custom_all_gather(self, input_: torch.Tensor) -> torch.Tensor:
        return input_

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        self.events.append("capture")
        yield


class CudaCommunicator(DeviceCommunicatorBase):
    """Notes which of vLLM's own buffers it would allocate."""

    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
        global_ranks: list[int] | None = None,
        global_world_size: int | None = None,
        tcp_store_group: StatelessProcessGroup | None = None,
        use_all2all: bool = False,
    ):
        super().__init__(cpu_group, device, device_group, unique_name)
        from vllm.distributed.parallel_state import _ENABLE_CUSTOM_ALL_REDUCE

        tensor_parallel = unique_name.split(":")[0] == "tp"
        self.ca_comm = CustomAllreduce(self.events) if tensor_parallel and _ENABLE_CUSTOM_ALL_REDUCE else None
        switches = {
            "custom": self.ca_comm is not None,
            "flashinfer": envs.VLLM_ALLREDUCE_USE_FLASHINFER,
            "pcie": envs.VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC,
            "symm_mem": envs.VLLM_ALLREDUCE_USE_SYMM_MEM,
        }
        self.buffers = [name for name, on in switches.items() if on and tensor_parallel]

    def all_reduce(self, input_):
        return super().all_reduce(input_)
