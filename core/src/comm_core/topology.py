"""A group's ranks, hosts, devices and links, as the ranks reported them: frozen, the same on every rank.

Pure data, filled in by core's probe. Everything here converts to JSON and back, so a topology can be recorded on one
machine and explained on another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["SCHEMA", "Device", "Host", "Link", "RankInfo", "Topology"]

SCHEMA = 1
"""The version of the JSON that `Topology.to_json` writes."""


@dataclasses.dataclass(frozen=True)
class Host:
    """The host of a rank.

    Attributes:
        name: the host name, for messages only: containers and clones share names.
        id: equal for two ranks exactly if they share a running kernel, an IPC namespace and a /dev/shm, as CUDA IPC
            and POSIX shared memory require. Opaque.
        boot_id: the boot ID of the running kernel; equal in all containers of one machine, even if `id` differs.
        shm_nbytes: bytes free in /dev/shm at the time of the probe; None if unknown.
    """

    name: str
    id: str
    boot_id: str | None = None
    shm_nbytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Link:
    """The connection of a rank's device to another device of its host, according to NVML.

    Attributes:
        nvlinks: active NVLinks to the other device, direct or through a switch; 0 for none, None if unknown.
        p2p: whether the driver allows peer reads and writes; None if unknown.
        reason: the driver's explanation if `p2p` isn't True, `nvlinks` is 0 or something is unknown, such as
            "NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED".
    """

    nvlinks: int | None = None
    p2p: bool | None = None
    reason: str = ""


UNKNOWN_LINK = Link(reason="neither rank's driver reported the other's device")
"""The result of `Topology.link` if neither device reported the other."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The accelerator that a rank uses in this group.

    Attributes:
        type: "cuda".
        uuid: such as "GPU-…" or "MIG-…"; independent of `CUDA_VISIBLE_DEVICES`.
        name: the driver's name for it.
        capability: compute capability, such as (9, 0) for Hopper.
        memory_nbytes: total device memory.
        fabric: "cluster UUID/clique id" of its NVLink fabric; None if it is in no fabric.
        links: its links to the other devices that this rank's driver sees, by their UUIDs.
    """

    type: str
    uuid: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    memory_nbytes: int = 0
    fabric: str | None = None
    links: Mapping[str, Link] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RankInfo:
    """The report of one rank of a group.

    Attributes:
        global_rank: its rank in the job.
        host: its host.
        device: its accelerator in this group; None for a group on CPUs.
        allocator: torch's CUDA allocator: "native", "expandable_segments", "cudaMallocAsync" or another's name; None
            without an accelerator.
        versions: of "comm_core", "torch", "python" and, if present, "cuda", "nccl", "driver".
        plugins: version of each installed plugin's distribution, by backend name.
        facts: each plugin's result of `probe()`, by backend name.
        unknown: the reason for each field of unknown value, by the field's name.
    """

    global_rank: int
    host: Host
    device: Device | None = None
    allocator: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plugins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON."""
        data: dict[str, Any] = _compact(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankInfo:
        """Build a report from the output of `to_json`."""
        fields = dict(data)
        fields["host"] = Host(**fields["host"])
        if fields.get("device") is not None:
            device = dict(fields["device"])
            device["capability"] = tuple(device.get("capability", (0, 0)))
            device["links"] = {uuid: Link(**link) for uuid, link in device.get("links", {}).items()}
            fields["device"] = Device(**device)
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A process group, described by the reports of its ranks.

    Attributes:
        ranks: the reports, by group rank.
        device_types: the device types that the group can reduce on, such as ("cuda", "cpu"), the main one first.
    """

    ranks: tuple[RankInfo, ...]
    device_types: tuple[str, ...] = ("cpu",)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @property
    def one_host(self) -> bool:
        """True if all ranks share a kernel, an IPC namespace and a /dev/shm."""
        return len({info.host.id for info in self.ranks}) == 1

    def link(self, rank: int, peer: int) -> Link:
        """Return the link between the devices of two group ranks, as reported by `rank`, else by `peer`.

        Ranks on two hosts, or without devices, have an unknown link: `p2p` and `nvlinks` are None.
        """
        one, other = self.ranks[rank].device, self.ranks[peer].device
        if one is None or other is None:
            return UNKNOWN_LINK
        if self.ranks[rank].host.boot_id != self.ranks[peer].host.boot_id:
            return UNKNOWN_LINK
        return one.links.get(other.uuid) or other.links.get(one.uuid) or UNKNOWN_LINK

    def to_json(self) -> dict[str, Any]:
        """Return the topology as JSON, with its schema number."""
        return {
            "schema": SCHEMA,
            "device_types": list(self.device_types),
            "ranks": [info.to_json() for info in self.ranks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Topology:
        """Build a topology from the output of `to_json`.

        Raises:
            ValueError: the schema number isn't this release's.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"this topology has schema {data.get('schema')!r}; this release reads {SCHEMA}")
        return cls.of(map(RankInfo.from_json, data["ranks"]), tuple(data["device_types"]))

    @classmethod
    def of(cls, ranks: Iterable[RankInfo], device_types: tuple[str, ...] = ("cpu",)) -> Topology:
        """Build a topology from the ranks' reports, by group rank."""
        return cls(tuple(ranks), device_types)


def _compact(value: Any) -> Any:
    """Return a value as JSON, each dataclass reduced to the fields that differ from their defaults."""
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _compact(item) for field, item in fields if item != _default(field)}
    if isinstance(value, Mapping):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_compact(item) for item in value]
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
