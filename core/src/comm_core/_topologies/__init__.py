"""Topologies to ask a backend about: machines recorded or written by hand (the JSON files here), and groups of CPUs.

They come with core, so that the author of a plugin can see how it answers on machines that aren't at hand.
"""

from __future__ import annotations

from importlib import resources

from comm_core._schema import load_json
from comm_core.topology import Host, RankInfo, Topology

__all__ = ["load_topologies"]

#: Groups on CPUs that are made here: the number of ranks, and the number of them on each host.
_CPU_GROUPS = {"cpus-1-rank": (1, 1), "cpus-3-ranks": (3, 3), "cpus-8-ranks": (8, 8), "cpus-64-ranks": (64, 8)}


def load_topologies() -> dict[str, Topology]:
    """Return the topologies by name: the files', then those made here."""
    files = sorted(resources.files(__name__).iterdir(), key=lambda file: file.name)
    recorded = {
        file.name.removesuffix(".json"): Topology.from_json(load_json(file.read_text(encoding="utf-8")))
        for file in files
        if file.name.endswith(".json")
    }
    return recorded | {name: _cpu_group(*sizes) for name, sizes in _CPU_GROUPS.items()}


def _cpu_group(world_size: int, ranks_per_host: int) -> Topology:
    return Topology.of(
        RankInfo(
            rank,
            Host(
                name=f"node-{host}",
                id=f"boot-{host} ipc 4:1 shm 131:1",
                boot_id=f"boot-{host}",
                shm_nbytes=8 << 30,
                network=f"4:{host}",
            ),
            versions={"comm_core": "0.1.0", "python": "3.12.8", "torch": "2.13.0+cpu"},
        )
        for rank, host in ((rank, rank // ranks_per_host) for rank in range(world_size))
    )
