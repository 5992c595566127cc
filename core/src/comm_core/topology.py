"""A group's ranks, hosts, devices and links, as the ranks reported them: frozen, the same on every rank.

Pure data, filled in by core's probe. Everything here converts to JSON and back, so a topology can be recorded on one
machine and explained on another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from comm_core import _schema

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
        network: the network namespace, unique on a machine, as `comm_core.memory` requires it in common. Opaque; None
            if unknown.
    """

    name: str
    id: str
    boot_id: str | None = None
    shm_nbytes: int | None = None
    network: str | None = None


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
        """Build a report from the output of `to_json`; unknown fields, as of a later release, are ignored.

        Control characters in texts become "?".

        Raises:
            ValueError: a field is missing or has the wrong type; the text names it.
        """
        info: RankInfo = _RANK_INFO(data, "info")
        return info


_TEXT, _SIZE = _schema.text, _schema.integer()
_TEXTS = _schema.mapping_of(_TEXT)
_LINK = _schema.record(Link, nvlinks=_schema.optional(_SIZE), p2p=_schema.optional(_schema.boolean), reason=_TEXT)
_DEVICE = _schema.record(
    Device,
    type=_TEXT,
    uuid=_TEXT,
    name=_TEXT,
    capability=_schema.tuple_of(_SIZE, 2, 2),
    memory_nbytes=_SIZE,
    fabric=_schema.optional(_TEXT),
    links=_schema.mapping_of(_LINK),
)
_RANK_INFO = _schema.record(
    RankInfo,
    global_rank=_SIZE,
    host=_schema.record(
        Host,
        name=_TEXT,
        id=_TEXT,
        boot_id=_schema.optional(_TEXT),
        shm_nbytes=_schema.optional(_SIZE),
        network=_schema.optional(_TEXT),
    ),
    device=_schema.optional(_DEVICE),
    allocator=_schema.optional(_TEXT),
    versions=_TEXTS,
    plugins=_TEXTS,
    facts=_schema.mapping_of(_schema.anything),
    unknown=_TEXTS,
)


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
            ValueError: the schema number isn't this release's, or a field is missing or has the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            found = _schema.shorten(repr(data.get("schema")), 60) if isinstance(data, Mapping) else "none"
            raise ValueError(f"this topology has schema {found}; this release reads {SCHEMA}")
        topology: Topology = _TOPOLOGY(data, "topology")
        return topology

    @classmethod
    def of(cls, ranks: Iterable[RankInfo], device_types: tuple[str, ...] = ("cpu",)) -> Topology:
        """Build a topology from the ranks' reports, by group rank."""
        return cls(tuple(ranks), device_types)


_TOPOLOGY = _schema.record(Topology, ranks=_schema.tuple_of(_RANK_INFO, 1), device_types=_schema.tuple_of(_TEXT, 1))


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
