"""Which groups the backend serves, and the reason why it can't serve others: on made-up topologies."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
from typing import Any

import comm_core as comm
import comm_plugin_flashinfer_fusion as plugin
import pytest
from comm_core._plan.routes import Offer, plan_routes
from comm_core.types import TERMINAL
from made_up_topologies import ELSEWHERE, HERE, cuda_group

FACTS: dict[str, Any] = {"missing": None, "version": "0.7.2"}


group = functools.partial(cuda_group, "flashinfer_fusion", FACTS)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_nvlink_between_every_two_is_served(count: int, capability: tuple[int, int]) -> None:
    answer = plugin.is_available(group(count, capability=dict.fromkeys(range(count), capability)))
    assert isinstance(answer, comm.Available)
    assert answer.priority == 200
    (served,) = answer.ranges
    assert (served.op, served.dtypes, served.device_types) == (
        "all_reduce_add_rms_norm",
        ("float16", "bfloat16"),
        ("cuda",),
    )
    assert served.max_nbytes == {2: 8 << 20, 4: 2 << 20, 8: 1 << 20}[count]


def test_nothing_is_served_before_a_workspace_is_created() -> None:
    answer = plugin.is_available(group())
    assert isinstance(answer, comm.Available)
    routes = plan_routes([Offer("flashinfer_fusion", answer.priority, answer.ranges)], ("cuda",))
    assert {rule.backend for route in routes for rule in route.rules} == {TERMINAL}


@pytest.mark.parametrize(
    ("topology", "reason"),
    [
        (comm.Topology(group().ranks, ("cpu",)), "CUDA tensors"),
        (group(1), "2, 4 or 8 ranks, and the group has 1"),
        (group(3), "2, 4 or 8 ranks, and the group has 3"),
        (group(16), "2, 4 or 8 ranks"),
        (
            comm.Topology.of(
                [comm.RankInfo(rank, HERE, facts={"flashinfer_fusion": FACTS}) for rank in (0, 1)], ("cuda",)
            ),
            "rank 0 has no CUDA device",
        ),
        (group(link=comm.Link(0, True, "no links")), "ranks 0 and 1 have no NVLink between them: no links"),
        (group(link=comm.Link(None, True)), "no NVLink"),
        (group(4, link=comm.Link(18, False, "NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED")), "no peer access"),
        (group(hosts={1: ELSEWHERE}), "its ranks are on 2 hosts"),
        (group(4, uuids={2: "GPU-0"}), "ranks 0 and 2 share the device GPU-0"),
        (group(capability={1: (10, 0)}), "its devices have different compute capabilities: 9.0, 10.0"),
        (
            group(capability={0: (8, 0), 1: (8, 0)}),
            "9.0 or newer, below 11.0, and the devices have 8.0",
        ),
        (group(capability={0: (12, 0), 1: (12, 0)}), "and the devices have 12.0"),
        (group(facts={1: {"missing": "flashinfer isn't installed"}}), "on rank 1 flashinfer isn't installed"),
        (
            group(facts={1: {"version": "0.7.1"}}),
            "version differs between ranks: 0.7.2 on rank 0, 0.7.1 on rank 1",
        ),
    ],
)
def test_other_groups_get_the_reason(topology: comm.Topology, reason: str) -> None:
    answer = plugin.is_available(topology)
    assert isinstance(answer, comm.Unavailable)
    assert reason in answer.reason


def test_a_rank_without_facts() -> None:
    ranks = [dataclasses.replace(info, facts={}) for info in group().ranks]
    answer = plugin.is_available(comm.Topology.of(ranks, ("cuda",)))
    assert isinstance(answer, comm.Unavailable)
    assert "rank 0 didn't report" in answer.reason


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("0.7.1", None),
        ("0.7.2.post1", None),
        ("0.10.0", None),
        (
            "0.7.0.post1",
            "flashinfer-python 0.7.0.post1 is older than 0.7.1: pip install 'flashinfer-python>=0.7.1'",
        ),
        (None, None),
    ],
)
def test_its_facts_have_the_version(monkeypatch: pytest.MonkeyPatch, version: str | None, missing: str | None) -> None:
    def installed(name: str) -> str:
        if version is None:
            # A package on the path that no installer has installed.
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", installed)
    facts = plugin.probe()
    assert facts == {"missing": missing, "version": version}
    assert len(json.dumps(facts)) < 512
