"""Find the installed backends and load each on its own, so that a broken one doesn't affect the others.

Each process keeps the result of each load: a module is imported once anyway, and a rank with a new result for a second
group would disagree with the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comm_core._control.deadline import describe, run_with_deadline
from comm_core._control.journal import journaled
from comm_core._plugins import validation
from comm_core._plugins.crashes import warn_of_crashes
from comm_core._plugins.installed import (
    GROUP,
    InstalledPlugin,
    LoadFailure,
    PluginRejectedError,
    check_name,
    check_requirements,
    list_installed,
    load_failure,
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
    "installed_plugins",
    "load_object",
    "replaced_hook",
    "reset",
]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Plugin:
    """A loaded backend with valid hooks.

    Attributes:
        name: the backend's name.
        distribution: its distribution's name; None if unknown.
        version: its distribution's version; None if unknown.
        hooks: its hooks as plain callables, by name; call them by position.
    """

    name: str
    distribution: str | None
    version: str | None
    hooks: Mapping[str, Callable[..., Any]]

    def has(self, hook: str) -> bool:
        """Return whether the plugin implements `hook`."""
        return hook in self.hooks


@dataclasses.dataclass(frozen=True)
class Discovery:
    """The installed backends, and the results of their loading.

    Attributes:
        plugins: the wanted backends that loaded, by name.
        failures: the wanted backends that can't be used, by name.
        listed: the versions of all installed backends, wanted or not, by name; "unknown" if the metadata lacks one.
    """

    plugins: dict[str, Plugin]
    failures: dict[str, LoadFailure]
    listed: dict[str, str]


# The longest import of a plugin with a replaced hook, in seconds.
_IMPORT_S = 60.0

_results: dict[InstalledPlugin, Plugin | LoadFailure] = {}
_lock = threading.RLock()


def reset() -> None:
    """Forget the list and every result, for tests. Imported modules stay imported."""
    with _lock:
        _results.clear()
        installed_plugins.cache_clear()


@contextlib.contextmanager
def replaced_hook(name: str, hook: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let this process call `replacement(original, *arguments)` for a hook of an installed backend, for tests.

    Sessions that are connected meanwhile keep the replacement. Without `connect`, a plugin's session is its context.
    """
    discover(lambda other: other == name, _IMPORT_S)
    entry, plugin = next(
        (entry, plugin) for entry, plugin in _results.items() if entry.name == name and isinstance(plugin, Plugin)
    )
    original = plugin.hooks.get(hook) or (lambda _topology, context: context)
    with _lock:
        _results[entry] = dataclasses.replace(
            plugin, hooks={**plugin.hooks, hook: functools.partial(replacement, original)}
        )
    try:
        yield
    finally:
        with _lock:
            _results[entry] = plugin


@functools.cache
def installed_plugins() -> tuple[InstalledPlugin | LoadFailure, ...]:
    """List the backends in the entry-point group, sorted by name; imports nothing, reads metadata once per process.

    Returns:
        For each an `InstalledPlugin`, or a `LoadFailure` if its metadata rules it out: a name that isn't allowed, or
        that several distributions register. A plugin under the terminal fallback's name is listed as
        "distribution:name".
    """
    return list_installed()


def load_object(name: str, plugin: object, version: str | None = None, distribution: str | None = None) -> Plugin:
    """Make a plugin of a module or an object, under the rules for installed ones; the result isn't kept.

    Raises:
        PluginLoadError: its name or its hooks break a rule; the text has the rule and the remedy.
    """
    try:
        check_name(name)
        return _build(name, plugin, distribution, version)
    except PluginRejectedError as rejection:
        failure = LoadFailure(name, distribution, version, rejection.reason, rejection.remedy)
        raise PluginLoadError(str(failure)) from rejection


def discover(wanted: Callable[[str], bool], timeout_s: float, cache_dir: str | None = None) -> Discovery:
    """Load the wanted backends among the installed ones; the others are listed, not imported.

    Args:
        wanted: returns whether a backend of this name may be used.
        timeout_s: the longest that the import of one plugin may take, in seconds.
        cache_dir: the setting.
    """
    warn_of_crashes(cache_dir)  # before the plugins, which may crash this process, too
    plugins: dict[str, Plugin] = {}
    failures: dict[str, LoadFailure] = {}
    for entry in filter(lambda entry: wanted(entry.name), installed_plugins()):
        result = _load_once(entry, timeout_s) if isinstance(entry, InstalledPlugin) else entry
        if isinstance(result, Plugin):
            plugins[entry.name] = result
        else:
            failures[entry.name] = result
    return Discovery(plugins, failures, {entry.name: entry.version or "unknown" for entry in installed_plugins()})


def _load_once(entry: InstalledPlugin, timeout_s: float) -> Plugin | LoadFailure:
    with _lock:
        if entry not in _results:
            _results[entry] = _load(entry, timeout_s)
        return _results[entry]


def _load(entry: InstalledPlugin, timeout_s: float) -> Plugin | LoadFailure:
    try:
        check_requirements(entry, __version__)
        name = f"the import of {entry.name}"
        return run_with_deadline(journaled(name, functools.partial(_import_plugin, entry)), timeout_s, name=name)
    except PluginRejectedError as rejection:
        failure = load_failure(entry, rejection)
        _log.debug("traceback of plugin '%s'", entry.name, exc_info=True)
    except TimeoutError:
        remedy = (
            f"See where it hangs: python -X importtime -c 'import {_module_name(entry)}'. If it only needs longer, "
            f"raise COMM_CORE_IMPORT_TIMEOUT_S; to skip the plugin, set COMM_CORE_DISABLE={entry.name}."
        )
        failure = load_failure(entry, PluginRejectedError(f"its import hasn't returned after {timeout_s:g} s", remedy))
    # Debug level, since every process finds this failure; the negotiation and `comm-core doctor` report it once.
    _log.debug("%s", failure)
    return failure


def _import_plugin(entry: InstalledPlugin) -> Plugin:
    try:
        plugin = metadata.EntryPoint(entry.name, entry.value, GROUP).load()
        return _build(entry.name, plugin, entry.distribution, entry.version)
    except (PluginRejectedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the plugin boundary: an import may raise anything, also SystemExit
        raise PluginRejectedError(
            f"its import raised {describe(error)}",
            f"See the traceback: python -c 'import {_module_name(entry)}'. Fix, reinstall or uninstall the plugin, "
            f"or set COMM_CORE_DISABLE={entry.name}.",
        ) from error


def _build(name: str, plugin: object, distribution: str | None, version: str | None) -> Plugin:
    return Plugin(name, distribution, version, validation.validate(name, plugin, distribution))


def _module_name(entry: InstalledPlugin) -> str:
    return entry.value.partition(":")[0].partition("[")[0].strip()
