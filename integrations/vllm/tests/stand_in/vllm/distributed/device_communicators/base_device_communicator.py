from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class DeviceCommunicatorBase:
    """Sums by torch.distributed; `events` has what vLLM's real communicators would do to devices."""

    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
    ) -> None:
        self.cpu_group, self.device, self.device_group = cpu_group, device, device_group
        self.unique_name = unique_name
        self.events: list[str] = []
        # As vLLM's real ones do: a rank without this package must not wait for the others here.
        dist.barrier(cpu_group)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        self.events.append("all_reduce")
        total = input_.clone()
        dist.all_reduce(total, group=self.device_group)
        return total

    def suspend(self) -> None:
        self.events.append("suspend")

    def resume(self) -> None:
        self.events.append("resume")

    def destroy(self):
        self.events.append("destroy")
