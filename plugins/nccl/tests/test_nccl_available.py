"""Which groups the backend serves, and the reason why it can't serve others: on made-up topologies."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import comm_core as comm
import comm_plugin_nccl as nccl
import pytest
from comm_plugin_nccl import library
from made_up_topologies import ELSEWHERE, HERE, cuda_group

FACTS: dict[str, Any] = {"missing": None, "nccl": "2.28.9", "library": "libnccl.so.2"}


group = functools.partial(cuda_group, "nccl", FACTS)


@pytest.mark.parametrize("count", [2, 3, 8, 72])
@pytest.mark.parametrize("hosts", [{}, {1: ELSEWHERE}])
def test_devices_on_any_number_of_hosts_are_served(count: int, hosts: dict[int, comm.Host]) -> None:
    answer = nccl.is_available(group(count, hosts=hosts))
    assert isinstance(answer, comm.Available)
    assert answer.priority == 100
    (served,) = answer.ranges
    sums = {"float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8"}
    assert set(served.dtypes or ()) == sums == set(comm.types.DTYPES) - {"int16"}
    assert served == comm.Range("all_reduce", dtypes=served.dtypes, device_types=("cuda",))


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (comm.Topology(group().ranks, ("cpu",)), "it sums CUDA tensors, and this group has none"),
        (group(1), "two ranks or more"),
        (comm.Topology.of([group().ranks[0], comm.RankInfo(1, HERE)], ("cuda",)), "rank 1 has no CUDA device"),
        (group(3, uuids={2: "GPU-0"}), "ranks 0 and 2 share the device GPU-0"),
        (group(facts={1: {"missing": "nccl4py isn't there"}}), "on rank 1 nccl4py isn't there"),
        (
            group(facts={1: {"nccl": "3.0.1"}}),
            "version differs between ranks: 2.28.9 on rank 0, 3.0.1 on rank 1",
        ),
        (group(3, facts={2: {"nccl": "2.27.3"}}), "2.28.9 on rank 0, 2.27.3 on rank 2"),
    ],
)
def test_other_groups_get_the_reason(topology: comm.Topology, reason: str) -> None:
    answer = nccl.is_available(topology)
    assert isinstance(answer, comm.Unavailable)
    assert reason in answer.reason


def test_a_rank_without_facts() -> None:
    ranks = [dataclasses.replace(info, facts={}) for info in group().ranks]
    answer = nccl.is_available(comm.Topology.of(ranks, ("cuda",)))
    assert isinstance(answer, comm.Unavailable)
    assert "rank 0 didn't report" in answer.reason


class Binding:
    """The functions of nccl4py's module that the probe uses."""

    def get_version(self) -> int:
        return 22809

    def get_library_path(self) -> str:
        return "/a/folder" * 100 + "/libnccl.so.2"


def test_its_facts_have_the_version_and_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", Binding)
    monkeypatch.delenv("NCCL_COMM_BLOCKING", raising=False)
    facts = nccl.probe()
    assert facts["missing"] is None
    assert facts["nccl"] == "2.28.9"
    assert facts["library"].endswith("/libnccl.so.2")
    assert len(json.dumps(facts)) <= 512
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "0")
    assert "NCCL_COMM_BLOCKING=0" in nccl.probe()["missing"]


def test_its_facts_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise ImportError("nccl4py can't be imported: " + "x" * 1000)

    monkeypatch.setattr(library, "load", load)
    facts = nccl.probe()
    assert facts["missing"].startswith("nccl4py can't be imported")
    assert len(json.dumps(facts)) <= 512
