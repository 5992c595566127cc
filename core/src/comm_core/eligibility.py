"""Requirements that several backends share: pure functions of the group's topology.

Each function returns "" if the group meets one requirement, otherwise the reason: one sentence without a full stop, for
`Unavailable`. A backend combines the checks that it needs:

```python
reason = eligibility.no_cuda(topology) or eligibility.missing_dependency(topology, "mine")
```
"""

from __future__ import annotations

from collections.abc import Sequence

from comm_core.topology import Topology

__all__ = [
    "differing_fact",
    "missing_dependency",
    "missing_links",
    "no_cuda",
    "several_hosts",
    "shared_device",
    "unfit_devices",
    "unfit_world_size",
    "unshared_memory",
]


def no_cuda(topology: Topology) -> str:
    """Require that the group reduces CUDA tensors and that every rank has a CUDA device."""
    if "cuda" not in topology.device_types:
        return "it sums CUDA tensors, and this group has none"
    for rank, info in enumerate(topology.ranks):
        if info.device is None or info.device.type != "cuda":
            return f"rank {rank} has no CUDA device"
    return ""


def unfit_world_size(topology: Topology, sizes: Sequence[int]) -> str:
    """Require a world size from `sizes`: a range or a list of at least two sizes, ascending."""
    if topology.world_size in sizes:
        return ""
    middle = " to " if isinstance(sizes, range) else " or "
    first = sizes[:1] if isinstance(sizes, range) else sizes[:-1]
    return f"it takes {', '.join(map(str, first))}{middle}{sizes[-1]} ranks, and the group has {topology.world_size}"


def missing_dependency(topology: Topology, name: str, dependency: str = "the native code") -> str:
    """Require that the fact "missing", which each rank's `probe` reports, is empty on every rank.

    Args:
        topology: the group.
        name: the backend's name.
        dependency: the dependency's name in the reason.
    """
    for rank, info in enumerate(topology.ranks):
        facts = info.facts.get(name)
        if facts is None:
            return f"rank {rank} didn't report whether it has {dependency}"
        if facts["missing"]:
            return f"on rank {rank} {facts['missing']}"
    return ""


def differing_fact(topology: Topology, name: str, key: str, label: str) -> str:
    """Require that a fact has the same value on every rank.

    Args:
        topology: a group in which every rank reports the fact.
        name: the backend's name.
        key: the fact's key in the result of the backend's `probe`.
        label: the fact's name in the reason, in the singular.
    """
    values = [info.facts[name][key] for info in topology.ranks]
    for rank, value in enumerate(values):
        if value != values[0]:
            return f"{label} differs between ranks: {values[0]} on rank 0, {value} on rank {rank}"
    return ""


def several_hosts(topology: Topology) -> str:
    """Require that all ranks share a kernel, an IPC namespace and a /dev/shm."""
    if topology.one_host:
        return ""
    hosts = len({info.host.id for info in topology.ranks})
    return f"its ranks are on {hosts} hosts, or in containers that share no memory"


def unshared_memory(topology: Topology) -> str:
    """Require that all ranks are on one machine, in one network namespace, as `comm_core.memory` does."""
    hosts = {info.host.boot_id or info.host.id for info in topology.ranks}
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} hosts"
    # A report without the namespace is of an earlier release, or of a system that doesn't show it.
    if len({info.host.network for info in topology.ranks} - {None}) > 1:
        return (
            "its ranks are in containers of different network namespaces, which can't share memory (docker run "
            "--network=host, or one pod, gives them one)"
        )
    return ""


def shared_device(topology: Topology) -> str:
    """Require that no two ranks share a device; call it only if every rank has one."""
    uuids = [info.device.uuid for info in topology.ranks if info.device is not None]
    for rank, uuid in enumerate(uuids):
        if uuid in uuids[:rank]:
            return f"ranks {uuids.index(uuid)} and {rank} share the device {uuid}"
    return ""


def unfit_devices(topology: Topology, oldest: tuple[int, int], below: tuple[int, int] | None = None) -> str:
    """Require that the ranks' devices are distinct and have one common, supported compute capability.

    Args:
        topology: a group in which every rank has a device.
        oldest: the lowest supported compute capability.
        below: the lowest later one without support; None: all later ones are supported.
    """
    shared = shared_device(topology)
    if shared:
        return shared
    capabilities = sorted({info.device.capability for info in topology.ranks if info.device is not None})
    listed = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    if len(capabilities) > 1:
        return f"its devices have different compute capabilities: {listed}"
    if capabilities[0] < oldest or (below is not None and capabilities[0] >= below):
        end = "or newer" if below is None else f"or newer, below {below[0]}.{below[1]}"
        return f"it takes compute capability {oldest[0]}.{oldest[1]} {end}, and the devices have {listed}"
    return ""


def missing_links(topology: Topology, *, nvlink: bool = True) -> str:
    """Require peer access between the devices of every two ranks, and NVLink unless `nvlink` is False."""
    for rank in range(topology.world_size):
        for peer in range(rank):
            link = topology.link(peer, rank)
            if nvlink and not link.nvlinks:
                return f"ranks {peer} and {rank} have no NVLink between them: {link.reason or 'none was found'}"
            if not link.p2p:
                return f"ranks {peer} and {rank} have no peer access: {link.reason or 'the driver gives none'}"
    return ""
