"""List installed backends and commands from metadata alone, and reject invalid ones."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from comm_core._control.deadline import describe
from comm_core._plugins.metadata_backport import metadata
from comm_core._schema import json_nbytes, printable, shorten
from comm_core.types import TERMINAL

__all__ = [
    "GROUP",
    "InstalledPlugin",
    "LoadFailure",
    "PluginRejectedError",
    "check_name",
    "check_requirements",
    "list_installed",
    "load_failure",
]

#: The entry-point group that plugins register under.
GROUP = "comm_core.backends"

#: The longest name of a backend and version of its distribution, in characters.
NAME_CHARS = 64

# The longest value of an entry point, and the longest requirement that is parsed, in characters.
_VALUE_CHARS = 256
_REQUIREMENT_CHARS = 1000
# The longest texts of a failure, as JSON in bytes. If several distributions share a name, it has all their names.
_FAILURE_NBYTES = {"name": NAME_CHARS, "distribution": 200, "version": 200, "reason": 1000, "remedy": 500}
# What the names and versions of all backends may take of a rank's message, as JSON in bytes: some hundred backends.
_LISTED_NBYTES = 12 << 10
_CORE = "comm-core"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REQUIREMENT_NAME = re.compile(r"\s*([A-Za-z0-9._-]+)")

_log = logging.getLogger(__name__)


class PluginRejectedError(Exception):
    """A plugin can't be used.

    Attributes:
        reason: the fault, without a full stop.
        remedy: the remedy, one or more sentences.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class InstalledPlugin:
    """An installed backend or command that isn't imported yet.

    Attributes:
        name: its entry point's name.
        value: its entry point's value, "module" or "module:object".
        distribution: its distribution's name; None if the metadata lacks it.
        version: its distribution's version; None if the metadata lacks it.
        requires: its distribution's requirements, verbatim.
    """

    name: str
    value: str
    distribution: str | None = None
    version: str | None = None
    requires: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoadFailure:
    """The fault of an installed backend or command that can't be used. Its texts are made printable and short.

    Attributes:
        name: its entry point's name.
        distribution: its distribution's name; None if unknown.
        version: its distribution's version; None if unknown.
        reason: the fault, without a full stop.
        remedy: the remedy, one or more sentences.
    """

    name: str
    distribution: str | None
    version: str | None
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        for field, nbytes in _FAILURE_NBYTES.items():
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, shorten(printable(value), nbytes))

    def __str__(self) -> str:
        source = " ".join(filter(None, (self.distribution, self.version))) or "an unknown distribution"
        return (
            f"plugin '{self.name}' ({source}) isn't used: {self.reason}. "
            f"The other backends are not affected. {self.remedy}"
        )


def list_installed(group: str = GROUP) -> tuple[InstalledPlugin | LoadFailure, ...]:
    """List the entries of an entry-point group, by default the backends', sorted by name; imports nothing."""
    by_name: dict[str, list[InstalledPlugin]] = {}
    found: list[InstalledPlugin | LoadFailure] = []
    for item in _all_entries(group):
        if isinstance(item, InstalledPlugin):
            by_name.setdefault(item.name, []).append(item)
        else:
            found.append(item)
    for entries in by_name.values():
        item = _reject_duplicates(entries)
        found.append(_check_entry(item, group) if isinstance(item, InstalledPlugin) else item)
    return _limit(sorted(found, key=lambda item: item.name))


def _limit(found: list[InstalledPlugin | LoadFailure]) -> tuple[InstalledPlugin | LoadFailure, ...]:
    """Return the entries; if all their names are too long for a message, refuse the largest distributions as a whole.

    So a distribution that registers hundreds of backends takes no room from the others.
    """
    sizes = Counter[str]()
    for item in found:
        sizes[item.distribution or ""] += json_nbytes([item.name, item.version or "unknown"])
    refused: list[str] = []
    for distribution, _ in sizes.most_common():
        if sizes.total() <= _LISTED_NBYTES:
            break
        del sizes[distribution]
        refused.append(distribution)
    if not refused:
        return tuple(found)
    kept = [item for item in found if (item.distribution or "") not in refused]
    count = len(found) - len(kept)
    reason = f"the names of the {count} backends of {', '.join(refused)} are more than the ranks can list to each other"
    remedy = "Uninstall backends that you don't use."
    return (LoadFailure(f"({refused[0]})", ", ".join(refused), None, reason, remedy), *kept)


def check_name(name: str) -> None:
    """Check that a backend may have this name.

    Raises:
        PluginRejectedError: the name is reserved, too long or malformed.
    """
    if len(name) > NAME_CHARS:
        raise PluginRejectedError(
            f"its name has {len(name)} characters; the limit is {NAME_CHARS}", "Give the entry point a shorter name."
        )
    if name == TERMINAL:
        raise PluginRejectedError(
            f"'{name}' is the name of comm-core's own fallback", "Give the entry point another name."
        )
    if not _NAME.fullmatch(name):
        raise PluginRejectedError(
            f"'{name}' isn't a valid backend name", "Name the entry point with a-z, 0-9 and _, beginning with a letter."
        )


def check_requirements(entry: InstalledPlugin, running: str) -> None:
    """Check that the entry's distribution accepts this comm-core: pip installs conflicts with no more than a warning.

    Args:
        entry: the installed entry.
        running: the running version of comm-core.

    Raises:
        PluginRejectedError: the requirement conflicts with it, or can't be read.
    """
    extras = ("", *(extra.strip() for extra in entry.value.partition("[")[2].rstrip("] ").split(",")))
    for text in entry.requires:
        name = _REQUIREMENT_NAME.match(text)
        if name is None or canonicalize_name(name[1]) != _CORE:
            continue
        shown = shorten(printable(text), 60)
        if len(text) > _REQUIREMENT_CHARS:
            raise PluginRejectedError(
                f"its requirement '{shown}' has {len(text)} characters; the limit is {_REQUIREMENT_CHARS}",
                _reinstall_remedy(entry),
            )
        try:
            conflicts = _conflicts(Requirement(text), extras, running)
        except Exception as error:  # a malformed one makes parsers of versions and markers raise many kinds of errors
            reason = f"its requirement '{shown}' can't be read: {describe(error)}"
            raise PluginRejectedError(reason, _reinstall_remedy(entry)) from error
        if conflicts:
            raise PluginRejectedError(
                f"it requires '{shown}', and comm-core {running} is running",
                f"Install releases that fit each other: pip install --upgrade {entry.distribution} comm-core",
            )


def _conflicts(requirement: Requirement, extras: tuple[str, ...], running: str) -> bool:
    marker = requirement.marker
    if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
        return False
    # Pre-releases count: 0.2rc1 comes before 0.2, so it satisfies >=0.1 but not >=0.2.
    return not requirement.specifier.contains(running, prereleases=True)


def _all_entries(group: str) -> Iterator[InstalledPlugin | LoadFailure]:
    """Yield the entries of every distribution; of several with one name, only those of the first on the path."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            # Most distributions don't use this group; ignore faults in their files.
            if group not in (distribution.read_text("entry_points.txt") or ""):
                continue
        except Exception as error:  # noqa: BLE001 - finders are foreign code; an unreadable file must hide no others
            _log.debug("a distribution's entry points can't be read: %s", describe(error))
            continue
        name = _distribution_name(distribution)
        if name is None:
            yield from _entries_of(distribution, None, group)
        elif name not in seen:
            seen.add(name)
            # The first that pip would see, apart from leftovers without metadata; it may have no entry any more.
            same = (other for other in metadata.distributions(name=name) if _distribution_name(other) == name)
            yield from _entries_of(next(same, distribution), name, group)


def _distribution_name(distribution: Any) -> str | None:
    try:
        return canonicalize_name(distribution.metadata["Name"])
    except Exception:  # noqa: BLE001 - without METADATA each Python version raises another error
        return None


def _entries_of(distribution: Any, name: str | None, group: str) -> Iterator[InstalledPlugin | LoadFailure]:
    version: str | None = None
    try:
        version = None if not name or distribution.version is None else str(distribution.version)
        requires = tuple(distribution.requires or ()) if name else ()
        points = [(point.name, point.value) for point in distribution.entry_points if point.group == group]
    except Exception as error:  # noqa: BLE001 - parsers raise many kinds of errors for malformed files
        unread = InstalledPlugin(name or group, "", name, version)
        yield load_failure(
            unread, PluginRejectedError(f"its metadata can't be read: {describe(error)}", _reinstall_remedy(unread))
        )
        return
    for point_name, value in points:
        yield InstalledPlugin(point_name, value, name, version, requires)


def _reject_duplicates(entries: list[InstalledPlugin]) -> InstalledPlugin | LoadFailure:
    # Leftovers of a removed distribution don't count if an intact one has the name.
    entries = [entry for entry in entries if entry.distribution is not None] or entries
    first = entries[0]
    if len(entries) > 1:
        sources = [f"{entry.distribution or 'an unknown distribution'} ({entry.value})" for entry in entries]
        return LoadFailure(
            first.name,
            ", ".join(dict.fromkeys(entry.distribution or "unknown" for entry in entries)),
            ", ".join(dict.fromkeys(entry.version or "unknown" for entry in entries)),
            f"the name is registered {len(entries)} times, by {' and by '.join(sources)}, and none can be preferred",
            "Uninstall all but one of them.",
        )
    if first.distribution is None:
        reason = "its distribution has no metadata, as after an interrupted removal"
        return load_failure(first, PluginRejectedError(reason, _reinstall_remedy(first)))
    return first


def _check_entry(entry: InstalledPlugin, group: str) -> InstalledPlugin | LoadFailure:
    """Return the entry if its name, version and value are allowed, else its failure."""
    try:
        if group == GROUP:
            check_name(entry.name)
        limits = {"name": NAME_CHARS, "version": NAME_CHARS, "value": _VALUE_CHARS}
        for field, limit in limits.items():
            text = getattr(entry, field) or ""
            if len(text) > limit:
                raise PluginRejectedError(
                    f"its {field} has {len(text)} characters; the limit is {limit}", _reinstall_remedy(entry)
                )
            if text != printable(text):
                raise PluginRejectedError(f"its {field} has characters that can't be printed", _reinstall_remedy(entry))
    except PluginRejectedError as rejection:
        if entry.name == TERMINAL:
            # Never under the fallback's own name, by which callers look up the fallback.
            entry = dataclasses.replace(entry, name=f"{entry.distribution}:{entry.name}")
        return load_failure(entry, rejection)
    return entry


def load_failure(entry: InstalledPlugin, rejection: PluginRejectedError) -> LoadFailure:
    """Make the failure of a rejected entry."""
    return LoadFailure(entry.name, entry.distribution, entry.version, rejection.reason, rejection.remedy)


def _reinstall_remedy(entry: InstalledPlugin) -> str:
    if entry.distribution is None:
        return "Find the *.dist-info folder without METADATA beside the installed packages, and remove it."
    return f"Install it again: pip install --force-reinstall --no-deps {entry.distribution}"
