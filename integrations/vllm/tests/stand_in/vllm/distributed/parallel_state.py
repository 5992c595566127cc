from __future__ import annotations

import contextlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_ENABLE_CUSTOM_ALL_REDUCE = True

groups: dict[str, GroupCoordinator] = {}
_created = Counter[str]()


class GraphCaptureContext(NamedTuple):
    stream: Any


def _get_unique_name(name: str) -> str:
    _created[name] += 1
    return f"{name}:{_created[name] - 1}"


class GroupCoordinator:
    """Two process groups of the world's ranks, and the communicator that the platform names."""

    def __init__(self, group_name: str) -> None:
        from vllm.platforms import current_platform

        self.unique_name = _get_unique_name(group_name)
        on_gpu = current_platform.device_name == "cuda" and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.device_group = dist.new_group(backend="nccl" if on_gpu else "gloo")
        self.cpu_group = dist.new_group(backend="gloo")
        device_comm_cls = pkgutil.resolve_name(current_platform.get_device_communicator_cls().replace(".Co", ":Co"))
        self.device_communicator = device_comm_cls(
            cpu_group=self.cpu_group,
            device=self.device,
            device_group=self.device_group,
            unique_name=self.unique_name,
            use_all2all=False,
        )
        groups[self.unique_name] = self

    @contextlib.contextmanager
    def graph_capture(self, graph_capture_context: GraphCaptureContext | None = None) -> Iterator[Any]:
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        with torch.cuda.stream(stream), self.device_communicator.ca_comm.capture():
            yield graph_capture_context or GraphCaptureContext(stream)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return self._all_reduce_out_place(input_)

    def _all_reduce_out_place(self, input_: torch.Tensor) -> torch.Tensor:
        return self.device_communicator.all_reduce(input_)

    def destroy(self) -> None:
        self.device_communicator.destroy()
        dist.destroy_process_group(self.device_group)
        dist.destroy_process_group(self.cpu_group)


def get_tp_group():
    return groups["tp:0"]


def suspend_device_comms() -> None:
    for group in groups.values():
        group.device_communicator.suspend()


def resume_device_comms() -> None:
    for group in groups.values():
        group.device_communicator.resume()
