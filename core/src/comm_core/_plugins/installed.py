"""Lists installed backends and commands from metadata alone, and says which of them can't be used."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from comm_core._control.deadline import describe
from comm_core._plugins.metadata_backport import metadata
from comm_core.types import TERMINAL

__all__ = [
    "GROUP",
    "InstalledPlugin",
    "LoadFailure",
    "Refused",
    "check_name",
    "check_requirements",
    "failed",
    "listing",
]

#: The entry-point group that plugins register under.
GROUP = "comm_core.backends"

_CORE = "comm-core"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REQUIREMENT_NAME = re.compile(r"\s*([A-Za-z0-9._-]+)")

_log = logging.getLogger(__name__)


class Refused(Exception):  # noqa: N818 - a verdict, on its way to becoming a LoadFailure
    """A plugin can't be used.

    Attributes:
        reason: what is wrong, without a full stop.
        remedy: what to do, one or more sentences.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class InstalledPlugin:
    """An installed backend that nobody has imported yet.

    Attributes:
        name: the backend's name.
        value: where it is, "module" or "module:object".
        distribution: what brings it; None where its metadata doesn't say.
        version: of the distribution; None where its metadata doesn't say.
        requires: the distribution's requirements, as its metadata has them.
    """

    name: str
    value: str
    distribution: str | None = None
    version: str | None = None
    requires: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoadFailure:
    """Why an installed backend can't be used.

    Attributes:
        name: the backend's name.
        distribution: what brings it; None where unknown.
        version: of the distribution; None where unknown.
        reason: what is wrong, without a full stop.
        remedy: what to do about it, one or more sentences.
    """

    name: str
    distribution: str | None
    version: str | None
    reason: str
    remedy: str

    def __str__(self) -> str:
        source = " ".join(filter(None, (self.distribution, self.version))) or "an unknown distribution"
        return (
            f"plugin '{self.name}' ({source}) isn't used: {self.reason}. "
            f"The other backends are not affected. {self.remedy}"
        )


def listing(group: str = GROUP) -> tuple[InstalledPlugin | LoadFailure, ...]:
    """Everything that registers in an entry-point group, by default the backends', sorted by name; imports nothing."""
    by_name: dict[str, list[InstalledPlugin]] = {}
    found: list[InstalledPlugin | LoadFailure] = []
    for item in _walk(group):
        if isinstance(item, InstalledPlugin):
            by_name.setdefault(item.name, []).append(item)
        else:
            found.append(item)
    for entries in by_name.values():
        item = _one(entries)
        found.append(_backend(item) if group == GROUP and isinstance(item, InstalledPlugin) else item)
    return tuple(sorted(found, key=lambda item: item.name))


def check_name(name: str) -> None:
    """Whether a backend may have this name.

    Raises:
        Refused: it may not.
    """
    if name == TERMINAL:
        raise Refused(f"'{name}' is the name of comm-core's own fallback", "Give the entry point another name.")
    if not _NAME.fullmatch(name):
        raise Refused(
            f"'{name}' isn't a valid backend name", "Name the entry point with a-z, 0-9 and _, beginning with a letter."
        )


def check_requirements(entry: InstalledPlugin, running: str) -> None:
    """Whether the entry's distribution takes this comm-core: pip installs what conflicts with no more than a warning.

    Args:
        entry: what is installed.
        running: the version of comm-core.

    Raises:
        Refused: it doesn't, or its requirement can't be read.
    """
    extras = ("", *(extra.strip() for extra in entry.value.partition("[")[2].rstrip("] ").split(",")))
    for text in entry.requires:
        name = _REQUIREMENT_NAME.match(text)
        if name is None or canonicalize_name(name[1]) != _CORE:
            continue
        try:
            conflicts = _conflicts(Requirement(text), extras, running)
        except (InvalidRequirement, UndefinedComparison, UndefinedEnvironmentName) as error:
            raise Refused(f"its requirement '{text}' can't be read: {describe(error)}", _reinstall(entry)) from error
        if conflicts:
            raise Refused(
                f"it requires '{text}', and comm-core {running} is running",
                f"Install releases that fit each other: pip install --upgrade {entry.distribution} comm-core",
            )


def _conflicts(requirement: Requirement, extras: tuple[str, ...], running: str) -> bool:
    marker = requirement.marker
    if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
        return False
    # A pre-release counts as what it is: 0.2rc1 comes before 0.2, so it satisfies >=0.1 but not >=0.2.
    return not requirement.specifier.contains(running, prereleases=True)


def _walk(group: str) -> Iterator[InstalledPlugin | LoadFailure]:
    """The entries of every distribution, but only of the first on the path where several have its name."""
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            # Most distributions have nothing to do with this group: what is broken in their files isn't its business.
            if group not in (distribution.read_text("entry_points.txt") or ""):
                continue
        except Exception as error:  # noqa: BLE001 - finders are foreign code, and one unreadable file must hide no others
            _log.debug("a distribution's entry points can't be read: %s", describe(error))
            continue
        name = _name(distribution)
        if name is None:
            yield from _entries(distribution, None, group)
        elif name not in seen:
            seen.add(name)
            # The first that pip would see, remains without metadata left aside; it may have no entry any more.
            same = (other for other in metadata.distributions(name=name) if _name(other) == name)
            yield from _entries(next(same, distribution), name, group)


def _name(distribution: Any) -> str | None:
    try:
        return canonicalize_name(distribution.metadata["Name"])
    except Exception:  # noqa: BLE001 - without METADATA each Python version raises something else
        return None


def _entries(distribution: Any, name: str | None, group: str) -> Iterator[InstalledPlugin | LoadFailure]:
    version: str | None = None
    try:
        version = distribution.version if name else None
        requires = tuple(distribution.requires or ()) if name else ()
        points = [(point.name, point.value) for point in distribution.entry_points if point.group == group]
    except Exception as error:  # noqa: BLE001 - a malformed file raises whatever its parser happens to trip over
        unread = InstalledPlugin(name or group, "", name, version)
        yield failed(unread, Refused(f"its metadata can't be read: {describe(error)}", _reinstall(unread)))
        return
    for point_name, value in points:
        yield InstalledPlugin(point_name, value, name, version, requires)


def _one(entries: list[InstalledPlugin]) -> InstalledPlugin | LoadFailure:
    # Remains of a half-removed distribution don't count where an intact one has the name.
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
        return failed(first, Refused(reason, _reinstall(first)))
    return first


def _backend(entry: InstalledPlugin) -> InstalledPlugin | LoadFailure:
    """The entry, if a backend may have its name."""
    try:
        check_name(entry.name)
    except Refused as refusal:
        if entry.name == TERMINAL:
            # Never under the fallback's own name, which others look up.
            entry = dataclasses.replace(entry, name=f"{entry.distribution}:{entry.name}")
        return failed(entry, refusal)
    return entry


def failed(entry: InstalledPlugin, refusal: Refused) -> LoadFailure:
    """The failure of an entry that was refused."""
    return LoadFailure(entry.name, entry.distribution, entry.version, refusal.reason, refusal.remedy)


def _reinstall(entry: InstalledPlugin) -> str:
    if entry.distribution is None:
        return "Look for a *.dist-info folder without METADATA beside the installed packages, and remove it."
    return f"Install it again: pip install --force-reinstall --no-deps {entry.distribution}"
