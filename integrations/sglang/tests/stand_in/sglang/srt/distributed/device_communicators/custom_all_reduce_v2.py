import contextlib

import torch
import torch.distributed as dist


class CustomAllReduceV2:
    """Sums by Gloo; says what it was asked for, and that it allocated buffers."""

    def __init__(self, group, device):
        self.group, self.device = group, device
        self.disabled = False
        self.events = ["allocate"]

    def should_custom_ar(self, inp: torch.Tensor) -> bool:
        return not self.disabled

    def custom_all_reduce(self, input: torch.Tensor) -> torch.Tensor:
        result = input.clone()
        dist.all_reduce(result, group=self.group)
        return result

    @contextlib.contextmanager
    def capture(self):
        self.events.append("capture")
        yield

    def close(self):
        dist.barrier(group=self.group)

    def __del__(self):
        self.close()
