"""Tuned tables: the rules and variants that `comm-core tune` measured for one kind of group, in the user's cache.

A table holds for groups with the same number of ranks, devices and links, and for the same versions of torch, the
driver, comm-core and its backends. A topology doesn't have the model of a CPU, so a table of CPUs holds for the hosts
of these names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comm_core import _schema
from comm_core._native import cache
from comm_core.errors import PluginLoadError
from comm_core.topology import Link, Topology
from comm_core.tuning import NO_RULES, TuningRule, VariantChoice, parse_rules

__all__ = ["SCHEMA", "TunedTable", "describe_group", "describe_versions", "find_table", "save_table"]

SCHEMA = 2
"""The version of a table's JSON."""
# The folder in the cache, and the largest file that is read, in bytes: far above a table with all its measurements.
_FOLDER = "tuned"
_MAX_NBYTES = 4 << 20
# The most choices of one backend: far above one for each measured size.
_MAX_CHOICES = 256
# Versions that don't matter to a backend's speed.
_IGNORED_VERSIONS = frozenset({"python"})


@dataclasses.dataclass(frozen=True)
class TunedTable:
    """Rules and variants that were measured for one kind of group.

    Attributes:
        group: the kind of group, as `describe_group` describes it.
        versions: the versions of all that matters, as `describe_versions` lists them.
        rules: the rules, in the form of `COMM_CORE_TUNE`; none if no change was worth one.
        provenance: how they came about, as JSON: the command, when, the machine and every time that was compared.
        variants: by backend, the choices among its variants, for the hook `use_variants`.
    """

    group: Mapping[str, Any]
    versions: Mapping[str, str]
    rules: tuple[TuningRule, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, tuple[VariantChoice, ...]] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A digest of what ranks must have in common: the group, the versions, the rules and the variants."""
        common = {name: value for name, value in self.to_json().items() if name != "provenance"}
        return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]

    def misfit(self, topology: Topology) -> str:
        """Return why the table doesn't hold for a group: one sentence without a full stop; "" if it does."""
        if self.group != describe_group(topology):
            return "it was measured in another kind of group"
        here = describe_versions(topology)
        differing = [name for name in sorted({*here, *self.versions}) if here.get(name) != self.versions.get(name)]
        if not differing:
            return ""
        texts = (f"{name} {self.versions.get(name, 'none')} then, {here.get(name, 'none')} now" for name in differing)
        return f"it was measured with other versions ({_schema.shorten('; '.join(texts), 300)})"

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON, with its schema number."""
        return {
            "schema": SCHEMA,
            "group": dict(self.group),
            "versions": dict(self.versions),
            "rules": list(map(str, self.rules)),
            "variants": {name: list(map(dataclasses.asdict, choices)) for name, choices in self.variants.items()},
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any) -> TunedTable:
        """Build a table from the output of `to_json`.

        Raises:
            ValueError: it has another schema number, or a field is missing or has the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            found = _schema.shorten(repr(data.get("schema")), 60) if isinstance(data, Mapping) else "none"
            raise ValueError(f"it has schema {found}; this release reads {SCHEMA}")
        table: TunedTable = _TABLE(data, "table")
        return table


def _read_rules(value: Any, where: str) -> tuple[TuningRule, ...]:
    texts = _schema.tuple_of(_schema.text)(value, where)
    return parse_rules(",".join(texts) or NO_RULES)


_ANY = _schema.mapping_of(_schema.anything)
_CHOICE = _schema.record(
    VariantChoice,
    op=_schema.text,
    variant=_schema.text,
    min_nbytes=_schema.integer(),
    max_nbytes=_schema.optional(_schema.integer()),
)
_CHOICES = _schema.tuple_of(_CHOICE, highest=_MAX_CHOICES)


def _read_choices(value: Any, where: str) -> tuple[VariantChoice, ...]:
    choices: tuple[VariantChoice, ...] = _CHOICES(value, where)
    ends: dict[str, int | None] = {}
    for choice in choices:
        end = ends.get(choice.op, -1)
        if end is None or choice.min_nbytes <= end:
            raise _schema.MalformedError(f"{where}: the sizes of {choice.op} overlap or don't ascend")
        ends[choice.op] = choice.max_nbytes
    return choices


_TABLE = _schema.record(
    TunedTable,
    group=_ANY,
    versions=_schema.mapping_of(_schema.text),
    rules=_read_rules,
    provenance=_ANY,
    variants=_schema.mapping_of(_read_choices),
)


def describe_group(topology: Topology) -> dict[str, Any]:
    """Return the properties of a group that the speed of its backends depends on, as JSON."""
    hosts = list(dict.fromkeys(info.host.id for info in topology.ranks))
    devices = [
        None if info.device is None else f"{info.device.name}, {'.'.join(map(str, info.device.capability))}"
        for info in topology.ranks
    ]
    found: dict[str, Any] = {
        "device_types": list(topology.device_types),
        "hosts": [hosts.index(info.host.id) for info in topology.ranks],
        "devices": devices,
    }
    ranks = range(topology.world_size)
    if any(devices):
        rows = [[_link(topology.link(rank, peer)) for peer in ranks if peer != rank] for rank in ranks]
        kinds = {link for row in rows for link in row}
        # One word if all are alike, since a rack has thousands.
        found["links"] = list(kinds) if len(kinds) == 1 else [" ".join(row) for row in rows]
    else:
        found["host_names"] = list(dict.fromkeys(info.host.name for info in topology.ranks))
    return found


def _link(link: Link) -> str:
    return f"NV{link.nvlinks}" if link.nvlinks else {True: "P2P", False: "none", None: "unknown"}[link.p2p]


def describe_versions(topology: Topology) -> dict[str, str]:
    """Return the versions that the speed of a group's backends depends on; those of the backends by "backend NAME"."""
    found: dict[str, set[str]] = {}
    for info in topology.ranks:
        named = {f"backend {name}": version for name, version in info.plugins.items()}
        for name, version in {**info.versions, **named}.items():
            if name not in _IGNORED_VERSIONS:
                found.setdefault(name, set()).add(version)
    return {name: " and ".join(sorted(found[name])) for name in sorted(found)}


def save_table(table: TunedTable, cache_dir: str | None) -> Path:
    """Write a table into this user's cache, in place of an earlier one for such groups; return the file.

    Args:
        table: the table.
        cache_dir: `Settings.cache_dir`.

    Raises:
        PluginLoadError: another user could write to the folder.
        OSError: the file can't be written.
    """
    data = json.dumps(table.to_json(), indent=1) + "\n"
    return cache.write_private(cache.root(cache_dir), _FOLDER, _file_name(table.group), data.encode())


def find_table(topology: Topology, cache_dir: str | None) -> TunedTable | None:
    """Return the table for a group from this user's cache; None if there is none.

    Args:
        topology: the group.
        cache_dir: `Settings.cache_dir`.

    Raises:
        ValueError: there is a file, but it doesn't hold for the group, can't be read, or others could have written it;
            the text is one sentence without a full stop.
    """
    try:
        top = cache.root(cache_dir)
    except PluginLoadError:  # without a home folder there is no cache
        return None
    name = _file_name(describe_group(topology))
    if not os.path.lexists(top / _FOLDER / name):
        return None
    try:
        data = cache.read_private(top, _FOLDER, name, _MAX_NBYTES)
        table = TunedTable.from_json(_schema.load_json(data.decode(), _MAX_NBYTES))
    except (OSError, PluginLoadError, ValueError) as error:
        raise ValueError(f"{top / _FOLDER / name} can't be used: {error}") from error
    if misfit := table.misfit(topology):
        raise ValueError(misfit)
    return table


def _file_name(group: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(group, sort_keys=True).encode()).hexdigest()[:16] + ".json"
