from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase


class CpuCommunicator(DeviceCommunicatorBase):
    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
        use_all2all: bool = False,
    ):
        super().__init__(cpu_group, device, device_group, unique_name)

    def all_reduce(self, input_):
        self.events.append("all_reduce")
        dist.all_reduce(input_, group=self.device_group)
        return input_
