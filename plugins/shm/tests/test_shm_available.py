"""Which groups the backend serves, and the reason why it can't serve others: on made-up topologies."""

from __future__ import annotations

from typing import Any

import comm_core as comm
import comm_plugin_shm as shm
import pytest

HERE = comm.Host("node", "boot ipc 1 shm 1", "boot")
FACTS = {"missing": None, "pid_namespace": "pid:[1]"}


def group(
    count: int = 2, hosts: dict[int, comm.Host] | None = None, facts: dict[int, dict[str, Any]] | None = None
) -> comm.Topology:
    ranks = (
        comm.RankInfo(rank, (hosts or {}).get(rank, HERE), facts={"shm": FACTS | (facts or {}).get(rank, {})})
        for rank in range(count)
    )
    return comm.Topology.of(ranks)


@pytest.mark.parametrize("count", [2, 3, 64])
def test_cpu_tensors_of_one_host_are_served(count: int) -> None:
    answer = shm.is_available(group(count))
    assert isinstance(answer, comm.Available)
    assert (answer.priority, answer.numerics) == (300, "rank_order_fp32")
    assert [(item.op, item.device_types, item.modes) for item in answer.ranges] == [
        ("all_reduce", ("cpu",), ("eager",))
    ]


def test_a_group_of_gpus_that_also_reduces_cpu_tensors_is_served() -> None:
    topology = comm.Topology(group().ranks, ("cuda", "cpu"))
    assert isinstance(shm.is_available(topology), comm.Available)


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (group(hosts={1: comm.Host("node", "other", "other")}), "2 hosts"),
        (group(65), "it takes 2 to 64 ranks, and the group has 65"),
        (group(3, facts={2: {"missing": "there is no C++ compiler"}}), "on rank 2 there is no C++ compiler"),
        (
            group(facts={1: {"pid_namespace": "pid:[2]"}}),
            "the PID namespace differs between ranks: pid:[1] on rank 0, pid:[2] on rank 1",
        ),
        (comm.Topology(group().ranks, ("cuda",)), "CPU tensors"),
        (comm.Topology.of([comm.RankInfo(rank, HERE) for rank in range(2)]), "rank 0 didn't report"),
    ],
)
def test_other_groups_get_the_reason(topology: comm.Topology, reason: str) -> None:
    answer = shm.is_available(topology)
    assert isinstance(answer, comm.Unavailable)
    assert reason in answer.reason


def test_its_facts() -> None:
    facts = shm.probe()
    assert set(facts) == {"missing", "pid_namespace"}
