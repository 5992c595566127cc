"""The faults of one plugin that show in one process: of its loading, its `probe`, and its `is_available`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

from comm_core._control.deadline import describe, run_with_deadline
from comm_core._control.journal import journaled
from comm_core._group.local_inputs import read_facts
from comm_core._plan.decide import encode_answer, with_explicit_ranges
from comm_core._plugins import discovery
from comm_core._topologies import load_topologies
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology
from comm_core.types import Available, Unavailable

__all__ = ["Examination", "PluginFault", "describe_faults", "examine", "examine_plugin"]

# The most topologies that a fault's text names.
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class PluginFault:
    """A fault of a plugin.

    Attributes:
        what: the fault, without a full stop.
        remedy: the remedy, one or more sentences.
        place: the file and line of the hook's function, "path:12"; "" if unknown.
    """

    what: str
    remedy: str
    place: str = ""


@dataclasses.dataclass
class Examination:
    """What was found about one plugin.

    Attributes:
        source: its distribution and version; "" if unknown.
        faults: its faults.
        facts: the result of its `probe`; None if it has none.
        answers: what `is_available` said about each topology, by the topology's name: "yes", or "no: " and the reason.
    """

    source: str = ""
    faults: list[PluginFault] = dataclasses.field(default_factory=list)
    facts: Any = None
    answers: dict[str, str] = dataclasses.field(default_factory=dict)


def describe_faults(name: str) -> list[str]:
    """Return the faults of the backend `name` as texts."""
    found = examine(name, Settings.read())
    return [
        " ".join(filter(None, (f"{fault.what}.", fault.place and f"({fault.place})", fault.remedy)))
        for fault in found.faults
    ]


def examine(name: str, settings: Settings) -> Examination:
    """Load the backend `name` and call its Local hooks `probe` and `is_available`."""
    found = discovery.discover(
        lambda other: other == name and settings.may_import(other), settings.import_timeout_s, settings.cache_dir
    )
    if name not in found.listed:
        return Examination(faults=[_absent(name, found.listed)])
    if not settings.may_import(name):
        variable = f"{PREFIX}DISABLE" if name in settings.disable else f"{PREFIX}PLUGINS"
        return Examination(faults=[PluginFault(f"{variable} forbids the import of '{name}'", "Change the variable.")])
    if failure := found.failures.get(name):
        source = " ".join(filter(None, (failure.distribution, failure.version)))
        return Examination(source, [PluginFault(failure.reason, failure.remedy, _place_of_load_failure(failure))])
    # Half of an exchange's deadline is the most that a Local hook gets in a job.
    return examine_plugin(found.plugins[name], settings.control_timeout_s / 2)


def examine_plugin(plugin: discovery.Plugin, timeout_s: float) -> Examination:
    """Call the Local hooks `probe` and `is_available` of a loaded plugin, each within the timeout, in seconds."""
    result = Examination(" ".join(filter(None, (plugin.distribution, plugin.version))))
    if plugin.has("probe"):
        try:
            result.facts = _probe(plugin, timeout_s)
        except _PluginFaultError as error:
            # A rank whose probe fails isn't asked about a topology, so neither is this one.
            result.faults.append(error.fault)
            return result
    if plugin.has("is_available"):
        _ask_about_each(plugin, timeout_s, result)
    return result


class _PluginFaultError(Exception):
    def __init__(self, what: str, remedy: str, function: Callable[..., Any]) -> None:
        super().__init__(what)
        self.fault = PluginFault(what, remedy, _place(function))


def _absent(name: str, listed: Mapping[str, str]) -> PluginFault:
    near = difflib.get_close_matches(name, listed, n=1)
    installed = ", ".join(listed) or "none"
    return PluginFault(
        f"no installed distribution has a backend '{name}' in the entry-point group {discovery.GROUP}; installed are: "
        + installed,
        f"Did you mean {near[0]}?" if near else "Install it in this environment: pip install -e FOLDER",
    )


def _probe(plugin: discovery.Plugin, timeout_s: float) -> Any:
    """Return the facts of the plugin's `probe`.

    Raises:
        _PluginFaultError: there are none, or they can't be sent.
    """
    probe = plugin.hooks["probe"]
    try:
        name = f"probe of {plugin.name}"
        found = run_with_deadline(journaled(name, probe), timeout_s, name=name)
    except Exception as error:  # plugin boundary, as in all functions here
        remedy = "Let it catch what can fail, and return the reason as a fact, on which is_available decides."
        raise _PluginFaultError(f"probe raised {describe(error)}", remedy, probe) from error
    try:
        return read_facts(found)
    except Exception as error:
        remedy = "Return few and short facts, as a dict of strings, numbers, booleans, None, lists and dicts."
        raise _PluginFaultError(f"the facts of probe can't be sent: {describe(error)}", remedy, probe) from error


def _ask_about_each(plugin: discovery.Plugin, timeout_s: float, result: Examination) -> None:
    """Ask about each topology that core has; add the answers and the faults to the result."""
    plugins = {plugin.name: plugin.version or ""}
    facts = {plugin.name: result.facts} if plugin.has("probe") else {}
    topologies: dict[PluginFault, list[str]] = {}
    known = load_topologies()
    for name, topology in known.items():
        ranks = (dataclasses.replace(info, plugins=plugins, facts=facts) for info in topology.ranks)
        asked = Topology.of(ranks, topology.device_types)
        try:
            result.answers[name] = _answer(plugin, asked, timeout_s)
        except _PluginFaultError as error:
            topologies.setdefault(error.fault, []).append(name)
            if isinstance(error.__cause__, TimeoutError):
                break  # the others would take as long
    for fault, names in topologies.items():
        listed = "all" if len(names) == len(known) else ", ".join(names[:_SHOWN])
        if len(names) > _SHOWN and listed != "all":
            listed += f" and {len(names) - _SHOWN} more"
        result.faults.append(dataclasses.replace(fault, what=f"{fault.what} (topologies: {listed})"))


def _answer(plugin: discovery.Plugin, topology: Topology, timeout_s: float) -> str:
    """Return the plugin's answer as text.

    Raises:
        _PluginFaultError: the hook gave no valid answer, or two that differ.
    """
    hook, name = plugin.hooks["is_available"], f"is_available of {plugin.name}"

    def ask() -> Available | Unavailable:
        # A copy for each call, as each rank has its own: what the hook changes in one isn't in the next.
        own = copy.deepcopy(topology)
        try:
            answer = run_with_deadline(journaled(name, lambda: hook(own)), timeout_s, name=name)
        except Exception as error:
            remedy = (
                "Let it return comm_core.Unavailable with the reason where the backend can't serve, else Available "
                "with ranges that some message meets."
            )
            raise _PluginFaultError(f"is_available raised {describe(error)}", remedy, hook) from error
        if not isinstance(answer, (Available, Unavailable)):
            what = f"is_available returned {type(answer).__name__}, neither Available nor Unavailable"
            raise _PluginFaultError(what, "Return comm_core.Available or comm_core.Unavailable.", hook)
        checked = with_explicit_ranges(answer, tuple(plugin.hooks)) if isinstance(answer, Available) else answer
        if checked is not answer and isinstance(checked, Unavailable):
            raise _PluginFaultError(
                checked.reason, "Return only ranges that the plugin's hooks can serve, and few.", hook
            )
        return checked

    first, second = ask(), ask()
    if encode_answer(first) != encode_answer(second):
        remedy = (
            "Decide from the argument `topology` alone: ranks that answer differently have only the ranges in common. "
            "A fact of one rank belongs into probe()."
        )
        raise _PluginFaultError("is_available gave two answers about one topology", remedy, hook)
    return f"no: {first.reason}" if isinstance(first, Unavailable) else f"yes, priority {first.priority}"


def _place(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def _place_of_load_failure(failure: discovery.LoadFailure) -> str:
    """Return the place of the hook that the reason begins with; "" if it begins with none, as after a failed import."""
    for entry in discovery.installed_plugins():
        if isinstance(entry, discovery.InstalledPlugin) and entry.name == failure.name:
            module, _, attribute = entry.value.partition("[")[0].replace(" ", "").partition(":")
            hook = failure.reason.split()[0].partition("(")[0]
            path = ".".join(filter(None, (attribute, hook)))
            with contextlib.suppress(Exception):  # reading an attribute may run the plugin's code
                return _place(operator.attrgetter(path)(sys.modules[module]))
    return ""
