"""On two GPUs: `init_process_group("comm")` gives what NCCL gives, also in streams and captured graphs."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from harness import Ranks

pytestmark = pytest.mark.gpus(2)
BOTH = "cpu:comm,cuda:comm"
# In bytes: on both sides of the size above which asynchronous sums have a stream of their own.
SIZES = [1 << 10, 1 << 16, 1 << 20, 1 << 21, 1 << 25]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CYCLES = 200_000_000  # a kernel of about 0.1 s


def data(nbytes: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers, whose sums are exact; they differ between the ranks."""
    generator = torch.Generator(device="cuda").manual_seed(100 * seed + dist.get_rank())
    return torch.randint(-8, 8, (nbytes // dtype.itemsize,), device="cuda", generator=generator).to(dtype)


def nccls(x: torch.Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """What NCCL makes of `x`."""
    y = x.clone()
    dist.all_reduce(y, op=op, group=group)
    return y


def sums() -> dict[str, int]:
    """The number of wrong results, by kind."""
    group, rank = dist.new_group(backend="nccl"), dist.get_rank()
    wrong = dict.fromkeys(("sum", "average", "overflow", "asynchronous", "mixed", "stream", "cpu"), 0)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for dtype in DTYPES:
        works, summed, expected = [], [], []
        for nbytes in SIZES:
            x = data(nbytes, dtype)
            right = nccls(x, group)
            for op, name in ((dist.ReduceOp.SUM, "sum"), (dist.ReduceOp.AVG, "average")):
                y = x.clone()
                dist.all_reduce(y, op=op)
                wrong[name] += not torch.equal(y, nccls(x, group, op))
            y = x.clone()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(_CYCLES // 100)
                dist.all_reduce(y)
            torch.cuda.current_stream().wait_stream(side)
            wrong["stream"] += not torch.equal(y, right)
            # One rank waits later, the other at once: both are served alike.
            y = x.clone()
            work = dist.all_reduce(y, async_op=rank == 0)
            if work is not None:
                work.wait()
            wrong["mixed"] += not torch.equal(y, right)
            y, z = x.clone(), x.clone()
            works.append(dist.all_reduce(y, async_op=True))
            dist.all_reduce(z)
            summed += [y, z]
            expected += [right, right]
        for work in works:
            assert work is not None
            work.wait()
        wrong["asynchronous"] += sum(not torch.equal(*pair) for pair in zip(summed, expected, strict=True))
    large = torch.full((512,), 60000.0, device="cuda", dtype=torch.float16)
    dist.all_reduce(large, op=dist.ReduceOp.AVG)
    wrong["overflow"] = int((large != 60000).sum())
    on_cpu = torch.full((8,), rank + 1.0)
    dist.all_reduce(on_cpu)
    wrong["cpu"] = int((on_cpu != 3).sum())
    return wrong


@pytest.mark.parametrize("backend", [BOTH, "cpu:gloo,cuda:comm"])
def test_sums_equal_nccls(ranks: Ranks, backend: str) -> None:
    for wrong in ranks.run(sums, backend=backend, installed=True, deadline_s=240):
        assert len(wrong) == 7
        assert wrong == dict.fromkeys(wrong, 0)


def completions() -> list[tuple[bool, str, bool]]:
    """Before a slow kernel ends: whether the sum after it is completed, and the error of a short wait; and then."""
    found = []
    for nbytes in (SIZES[0], SIZES[-1]):
        x = data(nbytes, torch.float32)
        dist.all_reduce(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(_CYCLES)
        work: Any = dist.all_reduce(x, async_op=True)
        early, error = work.is_completed(), ""
        try:
            work.wait(timedelta(milliseconds=1))
        except RuntimeError as raised:
            error = type(raised).__name__
        work.wait(timedelta(seconds=60))
        found.append((early, error, work.is_completed()))
    return found


def test_a_work_is_completed_when_the_gpu_is(ranks: Ranks) -> None:
    for found in ranks.run(completions, backend=BOTH, installed=True, deadline_s=240):
        assert found == [(False, "CommTimeoutError", True)] * 2


def replays(async_op: bool) -> int:
    """The number of wrong replays of graphs with `dist.all_reduce`."""
    group, wrong = dist.new_group(backend="nccl"), 0
    comm.pre_capture_init(max_tokens=128, hidden_size=2048, dtype=torch.bfloat16)
    for number, nbytes in enumerate(SIZES):
        static = data(nbytes, torch.bfloat16)
        dist.all_reduce(static.clone())
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph):
            y = static * 2
            work = dist.all_reduce(y, async_op=async_op)
            if work is not None:
                work.wait()
            y = y + 1
        for step in range(3):
            fresh = data(nbytes, torch.bfloat16, 10 * number + step)
            static.copy_(fresh)
            graph.replay()
            wrong += not torch.equal(y, nccls(fresh * 2, group) + 1)
        torch.cuda.synchronize()
        del graph
    return wrong


@pytest.mark.parametrize("async_op", [False, True])
def test_captured_sums_are_right_in_every_replay(ranks: Ranks, async_op: bool) -> None:
    assert ranks.run(replays, async_op, backend=BOTH, installed=True, deadline_s=240) == [0, 0]


def gradients() -> bool:
    """Whether DistributedDataParallel's gradients, in buckets of both kinds, are NCCL's."""
    found = []
    for group in (dist.group.WORLD, dist.new_group(backend="nccl")):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(1024, 1024) for _ in range(6)]
        model = torch.nn.Sequential(*layers).cuda()
        wrapped = DistributedDataParallel(model, process_group=group, bucket_cap_mb=5)
        torch.manual_seed(dist.get_rank())
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(torch.randn(16, 1024, device="cuda")).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))  # type: ignore[arg-type]


def test_gradients_of_data_parallel_equal_nccls(ranks: Ranks) -> None:
    assert ranks.run(gradients, backend=BOTH, installed=True, deadline_s=240) == [True, True]


def meshes() -> list[DeviceMesh]:
    """A mesh of this program's groups, and one of NCCL's."""
    return [init_device_mesh("cuda", (2,)), DeviceMesh.from_group(dist.new_group(backend="nccl"), "cuda")]


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 512)).cuda()


def shards() -> bool:
    """Whether the clipped gradients of a sharded model (FSDP2) are NCCL's."""
    found = []
    for mesh in meshes():
        model = fully_shard(layers(), mesh=mesh)
        torch.manual_seed(dist.get_rank())
        model(torch.randn(16, 512, device="cuda")).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        found.append([norm.full_tensor(), *(each.grad.to_local() for each in model.parameters())])  # type: ignore[attr-defined,union-attr]
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def tensor_parallel(compiled: bool) -> bool:
    """Whether a model in tensor parallelism, made of DTensors, gives what it gives on NCCL."""
    found = []
    for mesh in meshes():
        model: Any = parallelize_module(layers(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if compiled:
            model = torch.compile(model, fullgraph=True)
        torch.manual_seed(7)
        found.append(model(torch.randn(16, 512, device="cuda")))
    return torch.equal(*found)


def test_a_sharded_model_equals_nccls(ranks: Ranks) -> None:
    assert ranks.run(shards, backend=BOTH, installed=True, deadline_s=240) == [True, True]


@pytest.mark.parametrize("compiled", [False, True])
def test_tensor_parallelism_equals_nccls(ranks: Ranks, compiled: bool) -> None:
    assert ranks.run(tensor_parallel, compiled, backend=BOTH, installed=True, deadline_s=240) == [True, True]
