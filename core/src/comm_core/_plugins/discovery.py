"""Finds the installed backends and loads them, each on its own: one that is broken stops nobody.

A verdict is reached once a process and kept: a module is imported once anyway, and a rank that changed its mind between
two groups would disagree with the others.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from comm_core._control.deadline import describe, run_with_deadline
from comm_core._plugins import validation
from comm_core._plugins.installed import (
    GROUP,
    InstalledPlugin,
    LoadFailure,
    Refused,
    check_name,
    check_requirements,
    failed,
    listing,
)
from comm_core._plugins.metadata_backport import metadata
from comm_core._version import __version__
from comm_core.errors import PluginLoadError

__all__ = [
    "GROUP",
    "Discovery",
    "InstalledPlugin",
    "LoadFailure",
    "Plugin",
    "discover",
    "installed",
    "load_object",
    "reset",
]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Plugin:
    """A backend that was loaded and whose hooks keep the rules.

    Attributes:
        name: the backend's name.
        distribution: what brings it; None where unknown.
        version: of the distribution; None where unknown.
        hooks: its hooks as plain callables, by name, to be called by position.
    """

    name: str
    distribution: str | None
    version: str | None
    hooks: Mapping[str, Callable[..., Any]]

    def has(self, hook: str) -> bool:
        """Whether the plugin implements `hook`."""
        return hook in self.hooks


@dataclasses.dataclass(frozen=True)
class Discovery:
    """What is installed, and what became of it.

    Attributes:
        plugins: those that were wanted and loaded, by name.
        failures: those that were wanted and can't be used, by name.
        listed: the version of everything installed, also of what wasn't wanted, by name; "unknown" where metadata
            don't say.
    """

    plugins: dict[str, Plugin]
    failures: dict[str, LoadFailure]
    listed: dict[str, str]


_verdicts: dict[InstalledPlugin, Plugin | LoadFailure] = {}
_lock = threading.RLock()


def reset() -> None:
    """Forget the list and every verdict. For tests: modules that were imported stay imported."""
    with _lock:
        _verdicts.clear()
        installed.cache_clear()


@functools.cache
def installed() -> tuple[InstalledPlugin | LoadFailure, ...]:
    """Everything that registers in the entry-point group, sorted by name; imports nothing, looks once a process.

    Returns:
        For each an `InstalledPlugin`, or a `LoadFailure` if metadata alone rule it out: a name that isn't allowed, or
        that several register. A plugin that takes the terminal fallback's name is listed as "distribution:name".
    """
    return listing()


def load_object(name: str, plugin: object, version: str | None = None, distribution: str | None = None) -> Plugin:
    """Make a plugin of a module or an object at hand, under the rules for installed ones. Nothing is kept.

    Raises:
        PluginLoadError: its name or its hooks break a rule; the text says which, and what to do.
    """
    try:
        check_name(name)
        return _build(name, plugin, distribution, version)
    except Refused as refusal:
        failure = LoadFailure(name, distribution, version, refusal.reason, refusal.remedy)
        raise PluginLoadError(str(failure)) from refusal


def discover(wanted: Callable[[str], bool], timeout_s: float) -> Discovery:
    """Load every installed backend that is wanted; the others are listed, not imported.

    Args:
        wanted: whether a backend of this name may be used.
        timeout_s: how long the import of one plugin may take, in seconds.
    """
    plugins: dict[str, Plugin] = {}
    failures: dict[str, LoadFailure] = {}
    for item in filter(lambda item: wanted(item.name), installed()):
        verdict = _verdict(item, timeout_s) if isinstance(item, InstalledPlugin) else item
        if isinstance(verdict, Plugin):
            plugins[item.name] = verdict
        else:
            failures[item.name] = verdict
    return Discovery(plugins, failures, {item.name: item.version or "unknown" for item in installed()})


def _verdict(entry: InstalledPlugin, timeout_s: float) -> Plugin | LoadFailure:
    with _lock:
        if entry not in _verdicts:
            _verdicts[entry] = _attempt(entry, timeout_s)
        return _verdicts[entry]


def _attempt(entry: InstalledPlugin, timeout_s: float) -> Plugin | LoadFailure:
    try:
        check_requirements(entry, __version__)
        return run_with_deadline(functools.partial(_import, entry), timeout_s, name=f"the import of {entry.name}")
    except Refused as refusal:
        failure = failed(entry, refusal)
        _log.debug("how plugin '%s' failed", entry.name, exc_info=True)
    except TimeoutError:
        remedy = (
            f"See where it hangs: python -X importtime -c 'import {_module(entry)}'. If it only needs longer, raise "
            f"COMM_CORE_IMPORT_TIMEOUT_S; to go without it, set COMM_CORE_DISABLE={entry.name}."
        )
        failure = failed(entry, Refused(f"its import isn't back after {timeout_s:g} s", remedy))
    # Every rank and process finds it: who negotiates or is asked says it once, see `agreement` and `comm-core doctor`.
    _log.debug("%s", failure)
    return failure


def _import(entry: InstalledPlugin) -> Plugin:
    try:
        plugin = metadata.EntryPoint(entry.name, entry.value, GROUP).load()
        return _build(entry.name, plugin, entry.distribution, entry.version)
    except (Refused, KeyboardInterrupt):
        raise
    except BaseException as error:  # the plugin border: an import may raise anything, also SystemExit
        raise Refused(
            f"its import raised {describe(error)}",
            f"See the traceback: python -c 'import {_module(entry)}'. Mend or reinstall the plugin, uninstall it, or "
            f"set COMM_CORE_DISABLE={entry.name}.",
        ) from error


def _build(name: str, plugin: object, distribution: str | None, version: str | None) -> Plugin:
    return Plugin(name, distribution, version, validation.register(name, plugin))


def _module(entry: InstalledPlugin) -> str:
    return entry.value.partition(":")[0].partition("[")[0].strip()
