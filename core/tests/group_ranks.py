"""What the ranks of test_unusual_groups.py do; runs in their processes."""

from __future__ import annotations

import functools
import threading
from datetime import timedelta
from typing import Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core._group import local_inputs
from comm_core._probe.rank import Sources, probe_rank
from comm_core.env import MAX_TIMEOUT_S
from fake_nvml import FakeNvml, fake_torch
from handle_ranks import Outcome, outcome
from harness import side_store
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed import multi_threaded_pg
from torch.testing._internal.distributed.fake_pg import FakeStore

TIMEOUT = timedelta(seconds=60)


def renew_world(backend: str) -> None:
    """Replace the default process group by one with other backends: "dummyccl" is Gloo for XPU or CUDA tensors."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if "dummyccl" in backend and "DUMMYCCL" not in vars(dist.Backend):

        def make(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
            return dist.ProcessGroupGloo(store, rank, size, timeout)

        dist.Backend.register_backend("dummyccl", make, devices=["xpu", "cuda"])
    store = dist.PrefixStore("another world", side_store().clone())
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def get_over(backend: str) -> Outcome:
    """The handle of a group with these backends, of the world and of a subgroup, and a sum on CPUs."""
    renew_world(backend)
    first = outcome(comm.get_backend)
    again = outcome(lambda: comm.get_backend(dist.new_group(list(range(dist.get_world_size())))))
    assert first == again or first[0] == "ok"
    if first[0] == "ok":
        assert comm.get_backend().all_reduce(torch.tensor([1.0])).item() == dist.get_world_size()
    return first


def get_of_a_handmade_group(initialised: bool, name: str) -> Outcome:
    """A process group that torch's registry doesn't know, as engines that grow and shrink build them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("handmade", side_store().clone())
    if not initialised:
        dist.destroy_process_group()
    group = dist.ProcessGroup(store, rank, size)
    gloo = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    if name:
        group._set_group_name(name)
    tensor = torch.ones(1)
    group.allreduce([tensor]).wait()
    assert tensor.item() == size
    return outcome(lambda: comm.get_backend(group))


def get_without_a_world(group: Any) -> Outcome:
    dist.destroy_process_group()
    return outcome(lambda: comm.get_backend(group))


def play_a_rank_of_many(store: str) -> dict[str, Any]:
    """One process plays rank 3 of 8, as for estimates of memory, and for compiling on one machine."""
    dist.destroy_process_group()
    dist.init_process_group(
        "fake", store=FakeStore() if store == "fake" else dist.HashStore(), rank=3, world_size=8, timeout=TIMEOUT
    )
    found: dict[str, Any] = {}
    for title, group in (("world", None), ("subgroup", dist.new_group([1, 3, 5]))):
        backend = comm.get_backend(group)
        x = torch.arange(6.0).reshape(2, 3)
        normed, _ = backend.all_reduce_add_rms_norm(x, torch.zeros(2, 3), torch.ones(3))
        comm.pre_capture_init(max_tokens=4, hidden_size=3, dtype=torch.float32)
        found[title] = {
            "name": backend.name,
            "copy": torch.equal(backend.all_reduce(x), x),
            "in place": backend.all_reduce(x, out=x) is x,
            "normed": list(normed.shape),
            "ranks": [info.global_rank for info in backend.topology.ranks],
            "same": comm.get_backend(group) is backend,
        }
        comm.close(group)
    with FakeTensorMode(), torch.device("cpu"):
        found["fake tensor"] = list(comm.get_backend().all_reduce(torch.ones(5, 7)).shape)
    comm.close()
    found["named"] = outcome(lambda: comm.get_backend(backends=("shm",)))
    found["fallback named"] = outcome(lambda: comm.get_backend(backends=("torch_distributed",)))
    return found


def get_in_threads() -> list[Outcome]:
    """Threads of one process are the ranks, as in torch's own tests."""
    dist.destroy_process_group()
    store, found = dist.HashStore(), [("", "")] * 3

    def be(rank: int) -> None:
        dist.init_process_group("threaded", store=store, rank=rank, world_size=len(found))
        found[rank] = outcome(comm.get_backend)

    isolate: Any = torch._C._distributed_c10d._set_thread_isolation_mode
    isolate(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        threads = [threading.Thread(target=be, args=(rank,)) for rank in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        isolate(False)
    return found


def get_on_gpus(devices: tuple[int, ...], bound: tuple[int, ...] | None) -> Outcome:
    """Each rank's current device is the GPU of a number, if this machine had GPUs; no backend is installed."""
    renew_world("cpu:gloo,cuda:dummyccl")
    rank, mine = dist.get_rank(), devices[dist.get_rank()]
    fake = fake_torch(8)
    fake.cuda.current_device = lambda: mine
    sources = Sources(torch=lambda: fake, nvml=lambda: FakeNvml(8), environ={})
    device = torch.device("cuda", mine if bound is None else bound[rank])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_inputs, "probe_rank", functools.partial(probe_rank, sources=sources))
        patch.setattr(local_inputs, "_device_of", lambda _: device)
        return outcome(comm.get_backend)


def wait_the_longest() -> Any:
    """The longest deadline that core accepts, for exchanges, for `connect` and for a backend's own group."""
    backend = comm.get_backend(timeout_s=MAX_TIMEOUT_S)
    total = backend.all_reduce(torch.ones(1000))[-1].item()
    comm.close()
    return backend.name, total


def get_of_a_mesh() -> tuple[float, Outcome, Outcome]:
    """A sum in this rank's group of a mesh of [2, 2]; then the mesh itself, and one without this process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp = mesh["tp"]
    handle = comm.get_backend(tp)
    assert comm.get_backend(tp.get_group()) is handle
    total = handle.all_reduce(torch.tensor([float(dist.get_rank())])).item()
    comm.suspend(tp)
    comm.resume(tp)
    comm.close(tp)
    assert comm.get_backend(tp) is not handle
    comm.close(tp)
    part = DeviceMesh("cpu", [0, 1])
    without = outcome(lambda: comm.get_backend(part)) if dist.get_rank() > 1 else ("ok", "")
    return total, outcome(lambda: comm.get_backend(mesh)), without
