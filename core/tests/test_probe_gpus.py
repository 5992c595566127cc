from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pynvml
import pytest
import torch
from comm_core._probe.rank import probe_rank
from comm_core.topology import Device, RankInfo, Topology
from fake_nvml import NVLINK


def device_of(info: RankInfo) -> Device:
    assert info.device is not None, info.unknown
    return info.device


@pytest.fixture
def real_nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    yield
    pynvml.nvmlShutdown()


@pytest.mark.gpus(2)
def test_two_real_gpus(real_nvml: None) -> None:
    topology = Topology.of(
        (probe_rank(index, torch.device("cuda", index), plugins={}, facts={}) for index in range(2)), ("cuda",)
    )
    assert topology.one_host
    devices = [device_of(info) for info in topology.ranks]
    assert len({device.uuid for device in devices}) == 2
    handles = [pynvml.nvmlDeviceGetHandleByUUID(device.uuid) for device in devices]
    for rank, device in enumerate(devices):
        link = topology.link(rank, 1 - rank)
        has_nvlink = pynvml.nvmlDeviceGetP2PStatus(handles[rank], handles[1 - rank], NVLINK) == 0
        assert device.capability == torch.cuda.get_device_capability(rank)
        assert link.nvlinks is not None, link
        assert (link.nvlinks > 0) == has_nvlink
        assert link.p2p == torch.cuda.can_device_access_peer(rank, 1 - rank)
        assert topology.ranks[rank].allocator == "native"
        assert {"torch", "cuda", "nccl", "driver"} <= set(topology.ranks[rank].versions)
        assert topology.ranks[rank].unknown == {}


@pytest.mark.gpus(2)
def test_a_real_gpu_that_is_the_only_visible_one_knows_its_peer_and_starts_no_context_there() -> None:
    uuids = [device_of(probe_rank(i, torch.device("cuda", i), plugins={}, facts={})).uuid for i in range(2)]
    code = """
import ctypes, json, sys, torch
from comm_core._probe.rank import probe_rank
info = probe_rank(0, torch.device("cuda", int(sys.argv[1])), plugins={}, facts={})
cuda, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
contexts = []
for index in range(torch.cuda.device_count()):
    assert cuda.cuDevicePrimaryCtxGetState(index, ctypes.byref(flags), ctypes.byref(active)) == 0
    contexts.append(active.value)
print(json.dumps([info.to_json(), contexts]))
"""

    def ask(index: int, **environ: str) -> tuple[RankInfo, list[int]]:
        done = subprocess.run(
            [sys.executable, "-c", code, str(index)],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        info, contexts = json.loads(done.stdout)
        return RankInfo.from_json(info), contexts

    hidden, _ = ask(0, CUDA_VISIBLE_DEVICES=uuids[1])
    assert device_of(hidden).uuid == uuids[1]
    assert uuids[0] in device_of(hidden).links
    both, contexts = ask(1)
    assert device_of(both).uuid == uuids[1]
    assert contexts[0] == 0
