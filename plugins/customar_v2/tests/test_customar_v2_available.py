"""Where the backend says yes, and why it says no elsewhere: from made-up topologies."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import comm_core as comm
import comm_plugin_customar_v2 as customar_v2
import pytest
from comm_plugin_customar_v2 import norm_policy, policy

HERE = comm.Host("node", "boot ipc 1 shm 1", "boot")
FACTS: dict[str, Any] = {"missing": None, "forced": None}
NVLINK = comm.Link(18, True)


def group(
    count: int = 2,
    *,
    link: comm.Link = NVLINK,
    hosts: dict[int, comm.Host] | None = None,
    facts: dict[int, dict[str, Any]] | None = None,
    capability: dict[int, tuple[int, int]] | None = None,
    uuids: dict[int, str] | None = None,
    fabric: str | None = None,
) -> comm.Topology:
    names = [(uuids or {}).get(rank, f"GPU-{rank}") for rank in range(count)]
    return comm.Topology.of(
        (
            comm.RankInfo(
                rank,
                (hosts or {}).get(rank, HERE),
                comm.Device(
                    "cuda",
                    names[rank],
                    capability=(capability or {}).get(rank, (9, 0)),
                    fabric=fabric,
                    links={name: link for name in names if name != names[rank]},
                ),
                facts={"customar_v2": FACTS | (facts or {}).get(rank, {})},
            )
            for rank in range(count)
        ),
        ("cuda", "cpu"),
    )


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_nvlink_between_every_two(count: int, capability: tuple[int, int]) -> None:
    answer = customar_v2.is_available(group(count, capability=dict.fromkeys(range(count), capability)))
    assert isinstance(answer, comm.Available)
    assert (answer.priority, answer.numerics) == (300, "rank_order_fp32")
    largest = policy.rows_for(capability[0], count)[-1].up_to_nbytes
    dtypes = ("float32", "float16", "bfloat16")
    plain, *fused = (item for item in answer.ranges if not item.wire)
    wire = policy.wire_rows_for(capability[0], count)[-1].up_to_nbytes
    assert [item for item in answer.ranges if item.wire] == [
        comm.Range("all_reduce", None, dtypes[1:], ("cuda",), min_nbytes=1 << 20, max_nbytes=wire, wire="fp8")
    ] * (capability >= (8, 9))
    assert plain == comm.Range("all_reduce", dtypes=dtypes, device_types=("cuda",), max_nbytes=largest)
    # Rows of whole vectors of 16 bytes.
    assert {(item.op, item.dtypes, item.hidden_multiple) for item in fused} == {
        ("all_reduce_add_rms_norm", dtypes[:1], 4),
        ("all_reduce_add_rms_norm", dtypes[1:], 8),
        ("all_reduce_add_rms_norm_quant", dtypes[1:], 8),
    }
    for item in fused:
        assert (item.device_types, item.max_tokens, item.multiple_nbytes) == (("cuda",), None, 1)
        assert item.max_nbytes == norm_policy.rows_for(capability[0], count)[-1].up_to_nbytes


CONTAINERS = [comm.Host(f"pod-{i}", f"boot ipc {i} shm {i}", "boot", network=str(i)) for i in range(2)]


@pytest.mark.parametrize("hosts", [{1: comm.Host("other", "other", "other")}, dict(enumerate(CONTAINERS))])
def test_one_clique_on_two_hosts(hosts: dict[int, comm.Host]) -> None:
    topology = group(hosts=hosts, fabric="cluster/1")
    assert isinstance(customar_v2.is_available(topology), comm.Available)
    assert policy.needs_fabric(topology)


def test_containers_with_one_network_share_memory_as_files() -> None:
    hosts = {i: comm.Host(f"pod-{i}", f"boot ipc {i} shm {i}", "boot", network="1") for i in range(2)}
    assert isinstance(customar_v2.is_available(group(hosts=hosts)), comm.Available)
    assert not policy.needs_fabric(group(hosts=hosts))


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (comm.Topology(group().ranks, ("cpu",)), "CUDA tensors"),
        (group(1), "2 to 8 ranks"),
        (group(9), "2 to 8 ranks"),
        (comm.Topology.of([comm.RankInfo(0, HERE), comm.RankInfo(1, HERE)], ("cuda",)), "rank 0 has no CUDA device"),
        (group(link=comm.Link(0, True, "no links")), "ranks 0 and 1 have no NVLink between them: no links"),
        (group(link=comm.Link(None, True)), "no NVLink"),
        (group(link=comm.Link(18, False, "NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED")), "CHIPSET_NOT_SUPPORTED"),
        (group(hosts={1: comm.Host("other", "other", "other")}), "2 hosts, and they share no NVLink clique"),
        (group(hosts=dict(enumerate(CONTAINERS))), "different network namespaces"),
        (group(3, uuids={2: "GPU-0"}), "ranks 0 and 2 share the device GPU-0"),
        (group(capability={1: (8, 0)}), "different compute capabilities: 8.0, 9.0"),
        (group(capability={0: (7, 5), 1: (7, 5)}), "8.0 or newer"),
        (group(facts={1: {"missing": "there is no nvcc"}}), "on rank 1 there is no nvcc"),
        (group(facts={1: {"forced": [0, 2, 1, 256, 264, 0]}}), policy.OPTION),
    ],
)
def test_no_with_the_reason(topology: comm.Topology, reason: str) -> None:
    answer = customar_v2.is_available(topology)
    assert isinstance(answer, comm.Unavailable)
    assert reason in answer.reason


def test_a_rank_without_facts() -> None:
    ranks = [dataclasses.replace(info, facts={}) for info in group().ranks]
    answer = customar_v2.is_available(comm.Topology.of(ranks, ("cuda",)))
    assert isinstance(answer, comm.Unavailable)
    assert "rank 0 didn't report" in answer.reason


def test_its_facts_are_small_and_tell_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(customar_v2.probe()) == {"missing", "forced"}
    monkeypatch.setenv(policy.OPTION, "twoshot_push:vecs=4")
    assert customar_v2.probe()["forced"] == [0, 2, 4, 256, 264, 0]
    monkeypatch.setenv(policy.OPTION, "threeshot" * 100)
    facts = customar_v2.probe()
    assert facts["missing"]
    assert len(json.dumps(facts)) < 512


def test_a_forced_algorithm_is_the_same_for_every_size() -> None:
    forced = [0, policy.ALGORITHMS["twoshot_push"], 2, 128, 64, 1]
    topology = group(facts={0: {"forced": forced}, 1: {"forced": forced}})
    assert isinstance(customar_v2.is_available(topology), comm.Available)
    row = policy.forced_row(topology)
    assert row == policy.Row(0, "twoshot_push", 2, 128, 64, 1)
    rows = policy.rows_for(9, 2, row)
    assert [(item.algorithm, item.up_to_nbytes) for item in rows] == [("twoshot_push", 64 << 20)]
