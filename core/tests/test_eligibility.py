"""Each requirement that several backends share, on made-up topologies that meet it and that don't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from comm_core import eligibility
from comm_core.topology import Device, Host, Link, RankInfo, Topology

HERE = Host("node", "boot ipc 1 shm 1", "boot")


def group(*devices: Device | None, facts: dict[str, Any] | None = None, kinds: tuple[str, ...] = ("cuda",)) -> Topology:
    return Topology.of((RankInfo(i, HERE, device, facts=facts or {}) for i, device in enumerate(devices)), kinds)


def gpu(uuid: str, capability: tuple[int, int] = (9, 0), **links: Link) -> Device:
    return Device("cuda", uuid, capability=capability, links=links)


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (group(gpu("a"), gpu("b")), ""),
        (group(gpu("a"), gpu("b"), kinds=("cuda", "cpu")), ""),
        (group(gpu("a"), gpu("b"), kinds=("cpu",)), "it sums CUDA tensors, and this group has none"),
        (group(gpu("a"), None), "rank 1 has no CUDA device"),
        (group(gpu("a"), Device("xpu", "b")), "rank 1 has no CUDA device"),
    ],
)
def test_cuda(topology: Topology, reason: str) -> None:
    assert eligibility.no_cuda(topology) == reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"mine": {"missing": None}}, ""),
        ({"theirs": {"missing": None}}, "rank 0 didn't report whether it has a compiler"),
        ({"mine": {"missing": "there is no nvcc"}}, "on rank 0 there is no nvcc"),
    ],
)
def test_dependency(facts: dict[str, Any], reason: str) -> None:
    assert eligibility.missing_dependency(group(gpu("a"), gpu("b"), facts=facts), "mine", "a compiler") == reason


def test_the_dependency_is_native_code_unless_it_is_named() -> None:
    reason = eligibility.missing_dependency(group(gpu("a"), gpu("b")), "mine")
    assert reason == "rank 0 didn't report whether it has the native code"


@pytest.mark.parametrize(
    ("count", "sizes", "reason"),
    [
        (3, range(2, 9), ""),
        (4, (2, 4, 8), ""),
        (9, range(2, 9), "it takes 2 to 8 ranks, and the group has 9"),
        (3, (2, 4, 8), "it takes 2, 4 or 8 ranks, and the group has 3"),
        (3, (2, 4), "it takes 2 or 4 ranks, and the group has 3"),
    ],
)
def test_world_size(count: int, sizes: Sequence[int], reason: str) -> None:
    assert eligibility.unfit_world_size(group(*[None] * count), sizes) == reason


def test_a_fact_that_differs_is_named_with_both_values() -> None:
    ranks = [RankInfo(rank, HERE, facts={"mine": {"version": version}}) for rank, version in enumerate("112")]
    assert eligibility.differing_fact(Topology.of(ranks[:2]), "mine", "version", "its version") == ""
    reason = eligibility.differing_fact(Topology.of(ranks), "mine", "version", "its version")
    assert reason == "its version differs between ranks: 1 on rank 0, 2 on rank 2"


def test_hosts() -> None:
    here, there = RankInfo(0, HERE), RankInfo(1, Host("node", "boot ipc 2 shm 2", "boot"))
    assert eligibility.several_hosts(Topology.of([here, here])) == ""
    reason = eligibility.several_hosts(Topology.of([here, here, there]))
    assert reason == "its ranks are on 2 hosts, or in containers that share no memory"


def test_memory_is_shared_on_one_machine_in_one_network_namespace() -> None:
    def reason(*hosts: Host) -> str:
        return eligibility.unshared_memory(Topology.of([RankInfo(rank, host) for rank, host in enumerate(hosts)]))

    first, second = Host("a", "boot ipc 1 shm 1", "boot", network="1"), Host("b", "boot ipc 2 shm 2", "boot", None, "1")
    assert reason(first, first) == ""
    assert reason(HERE, HERE) == ""
    assert reason(first, second) == "", "containers with one network"
    assert reason(first, HERE) == "", "an unknown namespace"
    assert reason(first, Host("c", "other ipc 1 shm 1", "other", network="1")) == "its ranks are on 2 hosts"
    assert reason(Host("a", "x"), Host("a", "y")) == "its ranks are on 2 hosts", "hosts without a boot ID"
    apart = reason(first, Host("b", "boot ipc 2 shm 2", "boot", network="2"))
    assert apart.startswith("its ranks are in containers of different network namespaces")
    assert "--network=host" in apart


@pytest.mark.parametrize(
    ("link", "nvlink", "reason"),
    [
        (Link(18, True), True, ""),
        (Link(0, True), False, ""),
        (Link(0, True, "NVML: no"), True, "ranks 0 and 1 have no NVLink between them: NVML: no"),
        (Link(None, True), True, "ranks 0 and 1 have no NVLink between them: none was found"),
        (Link(18, False, "NVML: no"), True, "ranks 0 and 1 have no peer access: NVML: no"),
        (Link(0, None), False, "ranks 0 and 1 have no peer access: the driver gives none"),
    ],
)
def test_links(link: Link, nvlink: bool, reason: str) -> None:
    assert eligibility.missing_links(group(gpu("a", b=link), gpu("b")), nvlink=nvlink) == reason


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


def test_devices_that_are_too_new() -> None:
    assert eligibility.unfit_devices(group(gpu("a", (10, 3)), gpu("b", (10, 3))), (9, 0), below=(11, 0)) == ""
    reason = eligibility.unfit_devices(group(gpu("a", (12, 0)), gpu("b", (12, 0))), (9, 0), below=(11, 0))
    assert reason == "it takes compute capability 9.0 or newer, below 11.0, and the devices have 12.0"
