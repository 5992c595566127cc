"""Made-up topologies of ranks with CUDA devices, for tests of a backend's `is_available`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comm_core as comm

HERE = comm.Host("node", "boot ipc 1 shm 1", "boot")
ELSEWHERE = comm.Host("other", "other ipc 1 shm 1", "other")
NVLINK = comm.Link(18, True)


def cuda_group(
    backend: str,
    common_facts: Mapping[str, Any],
    count: int = 2,
    *,
    link: comm.Link = NVLINK,
    hosts: Mapping[int, comm.Host] | None = None,
    facts: Mapping[int, Mapping[str, Any]] | None = None,
    capability: Mapping[int, tuple[int, int]] | None = None,
    uuids: Mapping[int, str] | None = None,
) -> comm.Topology:
    """Return the topology of ranks on one host, each with a Hopper GPU and linked to every other.

    Mappings by rank change single ranks.
    """
    names = [(uuids or {}).get(rank, f"GPU-{rank}") for rank in range(count)]
    ranks = (
        comm.RankInfo(
            rank,
            (hosts or {}).get(rank, HERE),
            comm.Device(
                "cuda",
                names[rank],
                capability=(capability or {}).get(rank, (9, 0)),
                links={name: link for name in names if name != names[rank]},
            ),
            facts={backend: {**common_facts, **(facts or {}).get(rank, {})}},
        )
        for rank in range(count)
    )
    return comm.Topology.of(ranks, ("cuda", "cpu"))
