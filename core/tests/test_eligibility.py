"""Why a group can't be served by CUDA kernels, from made-up topologies."""

from __future__ import annotations

from typing import Any

import pytest
from comm_core import eligibility
from comm_core.topology import Device, Host, RankInfo, Topology

HERE = Host("node", "boot ipc 1 shm 1", "boot")


def group(*devices: Device | None, facts: dict[str, Any] | None = None, kinds: tuple[str, ...] = ("cuda",)) -> Topology:
    return Topology.of((RankInfo(i, HERE, device, facts=facts or {}) for i, device in enumerate(devices)), kinds)


def gpu(uuid: str, capability: tuple[int, int] = (9, 0)) -> Device:
    return Device("cuda", uuid, capability=capability)


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (group(gpu("a"), gpu("b")), ""),
        (group(gpu("a"), gpu("b"), kinds=("cuda", "cpu")), ""),
        (group(gpu("a"), gpu("b"), kinds=("cpu",)), "it sums CUDA tensors, and this group has none"),
        (group(gpu("a"), None), "not every rank has a CUDA device"),
        (group(gpu("a"), Device("xpu", "b")), "not every rank has a CUDA device"),
    ],
)
def test_cuda(topology: Topology, reason: str) -> None:
    assert eligibility.no_cuda(topology) == reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"mine": {"missing": None}}, ""),
        ({"theirs": {"missing": None}}, "rank 0 didn't report whether it has the native code"),
        ({"mine": {"missing": "there is no nvcc"}}, "on rank 0 there is no nvcc"),
    ],
)
def test_native_code(facts: dict[str, Any], reason: str) -> None:
    assert eligibility.no_native_code(group(gpu("a"), gpu("b"), facts=facts), "mine") == reason


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([gpu("a"), gpu("b")], ""),
        ([gpu("a", (8, 0)), gpu("b", (8, 0))], ""),
        ([gpu("a"), gpu("b"), gpu("a")], "ranks 0 and 2 share the device a"),
        ([gpu("a", (10, 0)), gpu("b", (9, 0))], "its devices have different compute capabilities: 9.0, 10.0"),
        ([gpu("a", (7, 5)), gpu("b", (7, 5))], "it takes compute capability 8.0 or newer, and the devices have 7.5"),
    ],
)
def test_devices(devices: list[Device], reason: str) -> None:
    assert eligibility.unfit_devices(group(*devices), (8, 0)) == reason
