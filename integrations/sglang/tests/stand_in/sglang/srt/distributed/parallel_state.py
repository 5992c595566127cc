import contextlib
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

_created = Counter()
_TP = None
_ATTN_TP = None


class GroupCoordinator:
    """Two process groups and the custom all-reduce that the dispatch chooses."""

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str,
        use_pynccl: bool,
        use_custom_allreduce: bool,
        group_name: str | None = None,
        gloo_timeout: timedelta = timedelta(seconds=60),
    ):
        self.unique_name = f"{group_name}:{_created[group_name]}"
        _created[group_name] += 1
        self.local_rank = local_rank
        on_gpu = torch_distributed_backend == "nccl"
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        for ranks in group_ranks:
            device_group = dist.new_group(ranks, backend=torch_distributed_backend)
            cpu_group = dist.new_group(ranks, backend="gloo", timeout=gloo_timeout)
            if dist.get_rank() in ranks:
                self.ranks, self.world_size = ranks, len(ranks)
                self.rank_in_group = ranks.index(dist.get_rank())
                self.device_group, self.cpu_group = device_group, cpu_group
        self.ca_comm = None
        from sglang.srt.distributed.device_communicators.custom_all_reduce import dispatch_custom_allreduce

        if use_custom_allreduce and self.world_size > 1:
            self.ca_comm = dispatch_custom_allreduce(group=self.cpu_group, device=self.device)(
                group=self.cpu_group, device=self.device
            )

    @contextlib.contextmanager
    def graph_capture(self, graph_capture_context=None, stream=None):
        if graph_capture_context is None:
            on_gpu = self.device.type == "cuda"
            graph_capture_context = SimpleNamespace(stream=torch.cuda.Stream() if on_gpu else None)
        maybe_ca_context = contextlib.nullcontext() if self.ca_comm is None else self.ca_comm.capture()
        with torch.cuda.stream(graph_capture_context.stream), maybe_ca_context:
            yield graph_capture_context

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return input_
        if not input_.is_cpu and self.ca_comm is not None and self.ca_comm.should_custom_ar(input_):
            return self._all_reduce_out_place(input_, "ca")
        dist.all_reduce(input_, group=self.device_group)
        return input_

    def _all_reduce_out_place(self, input_: torch.Tensor, outplace_all_reduce_method: str) -> torch.Tensor:
        assert not self.ca_comm.disabled
        return self.ca_comm.custom_all_reduce(input_)

    def destroy(self):
        dist.destroy_process_group(self.device_group)
        dist.destroy_process_group(self.cpu_group)
        self.ca_comm = None


def init_model_parallel_group(
    group_ranks, local_rank, backend, use_pynccl=None, use_custom_allreduce=None, group_name=None
):
    return GroupCoordinator(
        group_ranks=group_ranks,
        local_rank=local_rank,
        torch_distributed_backend=backend,
        use_pynccl=bool(use_pynccl),
        use_custom_allreduce=use_custom_allreduce is not False,
        group_name=group_name,
    )
