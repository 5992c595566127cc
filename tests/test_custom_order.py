"""The routes of made-up topologies if several backends of CUDA kernels are installed."""

from __future__ import annotations

from typing import Any

import comm_core as comm
import comm_plugin_customar_v1 as v1
import comm_plugin_customar_v2 as v2
import pytest
from comm_core._plan import decide

HERE = comm.Host("node", "boot ipc 1 shm 1", "boot")
NVLINK = comm.Link(18, True)
PCIE = comm.Link(0, True, "NVML: P2P_STATUS_NOT_SUPPORTED")
APART = comm.Link(0, False, "NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED")
BACKENDS: dict[str, Any] = {"customar_v1": v1, "customar_v2": v2}


def group(count: int, link: comm.Link) -> comm.Topology:
    names = [f"GPU-{rank}" for rank in range(count)]
    ranks = []
    for rank, name in enumerate(names):
        links = {other: link for other in names if other != name}
        device = comm.Device("cuda", name, capability=(9, 0), links=links)
        # The made-up hosts have all dependencies, even if this machine doesn't.
        facts = {backend: plugin.probe() | {"missing": None} for backend, plugin in BACKENDS.items()}
        plugins = dict.fromkeys(BACKENDS, "0.1.0")
        ranks.append(comm.RankInfo(rank, HERE, device, plugins=plugins, facts=facts))
    return comm.Topology.of(ranks, ("cuda",))


def slate(topology: comm.Topology, disabled: tuple[str, ...] = ()) -> decide.Slate:
    evidence = [decide.Evidence(info) for info in topology.ranks]
    asked, dropped = decide.screen_candidates(evidence, None, disabled, "")
    answers = {name: decide.encode_answer(BACKENDS[name].is_available(topology)) for name in asked}
    return decide.initial_slate(asked, [answers] * topology.world_size, dropped)


def serving(chosen: decide.Slate) -> dict[str, list[str]]:
    """Return the backends of a bfloat16 all-reduce's route by mode, the preferred first."""
    decision = chosen.decision(("cuda",))
    return {
        mode: [rule.backend for rule in decision.route("all_reduce", mode, "cuda", "bfloat16").rules]
        for mode in ("eager", "graph")
    }


@pytest.mark.parametrize(
    ("count", "link", "first"),
    [
        (2, NVLINK, "customar_v2"),
        (4, NVLINK, "customar_v2"),
        (2, PCIE, "customar_v1"),
        (4, PCIE, "torch_distributed"),
        (2, APART, "torch_distributed"),
    ],
)
def test_the_links_decide_which_backend_is_first(count: int, link: comm.Link, first: str) -> None:
    for backends in serving(slate(group(count, link))).values():
        assert backends[0] == first
        assert backends[-1] == "torch_distributed"


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_without_v2_v1_serves_before_torch_distributed(count: int) -> None:
    topology = group(count, NVLINK)
    disabled = slate(topology, ("customar_v2",))
    failed = slate(topology).without("customar_v2", "no symmetric memory today", 1)
    for chosen in (disabled, failed):
        assert serving(chosen) == {mode: ["customar_v1", "torch_distributed"] for mode in ("eager", "graph")}
        decision = chosen.decision(("cuda",))
        found = decision.candidate("customar_v2")
        assert found is not None
        assert found.reason in ("COMM_CORE_DISABLE names it", "no symmetric memory today")


def test_without_nvlink_the_decision_gives_that_reason_for_v2() -> None:
    decision = slate(group(2, PCIE)).decision(("cuda",))
    found = decision.candidate("customar_v2")
    assert found is not None
    assert (found.verdict, found.reason) == (
        "unavailable",
        "ranks 0 and 1 have no NVLink between them: NVML: P2P_STATUS_NOT_SUPPORTED",
    )


def test_behind_v2_v1_stays_on_standby() -> None:
    found = slate(group(4, NVLINK)).decision(("cuda",)).candidate("customar_v1")
    assert found is not None
    assert found.verdict == "standby"
