"""Which groups the backend serves, and the reason why it can't serve others: on made-up topologies."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import comm_core as comm
import comm_plugin_customar_v1 as customar_v1
import pytest
from comm_core import kernels, memory
from comm_plugin_customar_v1 import policy
from made_up_topologies import HERE, cuda_group

FACTS: dict[str, Any] = {"missing": None, "forced": None}
PCIE = comm.Link(0, True, "NVML: P2P_STATUS_NOT_SUPPORTED")
TWO_PCIE = Path(comm.__file__).parent / "_topologies" / "two-pcie-p2p.json"


group = functools.partial(cuda_group, "customar_v1", FACTS)


@pytest.mark.parametrize("count", policy.WORLD_SIZES)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_nvlink_between_every_two_is_served(count: int, capability: tuple[int, int]) -> None:
    answer = customar_v1.is_available(group(count, capability=dict.fromkeys(range(count), capability)))
    dtypes = ("float32", "float16", "bfloat16")
    served = comm.Range("all_reduce", dtypes=dtypes, device_types=("cuda",), max_nbytes=8 << 20)
    assert answer == comm.Available(200, (served,), numerics="rank_order_fp32")


@pytest.mark.parametrize("link", [PCIE, comm.Link(None, True, "NVLinks unknown without NVML")])
def test_two_need_no_nvlink(link: comm.Link) -> None:
    assert isinstance(customar_v1.is_available(group(2, link=link)), comm.Available)


def test_a_host_with_two_pcie_devices() -> None:
    topology = comm.Topology.from_json(json.loads(TWO_PCIE.read_text()))
    ranks = [dataclasses.replace(info, facts={"customar_v1": FACTS}) for info in topology.ranks]
    answer = customar_v1.is_available(comm.Topology.of(ranks, topology.device_types))
    assert isinstance(answer, comm.Available)


def containers(*networks: str) -> dict[int, comm.Host]:
    """Containers of one machine, each with an IPC namespace and a /dev/shm of its own."""
    return {i: comm.Host(f"pod-{i}", f"boot ipc {i} shm {i}", "boot", network=net) for i, net in enumerate(networks)}


def test_containers_with_one_network_share_memory() -> None:
    assert isinstance(customar_v1.is_available(group(hosts=containers("1", "1"))), comm.Available)


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (comm.Topology(group().ranks, ("cpu",)), "CUDA tensors"),
        (group(1), "2, 4, 6 or 8 ranks, and the group has 1"),
        (group(3), "2, 4, 6 or 8 ranks, and the group has 3"),
        (group(10), "2, 4, 6 or 8 ranks, and the group has 10"),
        (comm.Topology.of([comm.RankInfo(0, HERE), comm.RankInfo(1, HERE)], ("cuda",)), "rank 0 has no CUDA device"),
        (group(link=comm.Link(18, False, "NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED")), "CHIPSET_NOT_SUPPORTED"),
        (group(link=comm.Link(0, None)), "ranks 0 and 1 have no peer access: the driver gives none"),
        (group(4, link=PCIE), "more than two ranks need NVLink and peer access between every two"),
        (group(4, link=PCIE), "ranks 0 and 1 have no NVLink between them: NVML: P2P_STATUS_NOT_SUPPORTED"),
        (group(hosts={1: comm.Host("other", "other", "other")}), "2 hosts"),
        (group(hosts=containers("1", "2")), "containers of different network namespaces"),
        (group(4, uuids={2: "GPU-0"}), "ranks 0 and 2 share the device GPU-0"),
        (group(capability={1: (8, 0)}), "different compute capabilities: 8.0, 9.0"),
        (group(capability={0: (7, 5), 1: (7, 5)}), "8.0 or newer"),
        (group(facts={1: {"missing": "there is no nvcc"}}), "on rank 1 there is no nvcc"),
        (
            group(facts={1: {"forced": [8 << 20, 0, 1, 256, 264]}}),
            "differs between ranks: None on rank 0, [8388608, 0, 1, 256, 264] on rank 1",
        ),
        (
            group(4, facts={rank: {"forced": [8 << 20, 0, 4, 256, 264]} for rank in range(4)}),
            "asks for vecs=4, and with 4 ranks the kernels have 2 at most",
        ),
    ],
)
def test_other_groups_get_the_reason(topology: comm.Topology, reason: str) -> None:
    answer = customar_v1.is_available(topology)
    assert isinstance(answer, comm.Unavailable)
    assert reason in answer.reason


def test_its_facts_are_small_and_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(customar_v1.probe()) == {"missing", "forced"}
    with monkeypatch.context() as patch:
        patch.setattr(kernels.Library, "missing", lambda _: None)
        patch.setattr(memory, "missing", lambda: "cuda-bindings isn't installed")
        assert customar_v1.probe()["missing"] == "cuda-bindings isn't installed"
    monkeypatch.setenv(policy.OPTION, "two_stage:vecs=4")
    assert customar_v1.probe()["forced"] == [8 << 20, 1, 4, 256, 264]
    monkeypatch.setenv(policy.OPTION, "three_stage" * 100)
    facts = customar_v1.probe()
    assert facts["missing"]
    assert len(json.dumps(facts)) < 512


def test_a_forced_algorithm_is_the_same_for_every_size() -> None:
    row = policy.Row(8 << 20, "two_stage", 2, 128, 64)
    forced = {"forced": list(row.numbers())}
    topology = group(facts={0: forced, 1: forced})
    assert isinstance(customar_v1.is_available(topology), comm.Available)
    assert policy.forced_row(topology) == row
    assert policy.rows_for(2, row) == (row,)
