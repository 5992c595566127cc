"""`comm-core doctor`: the state of this host, torch and the plugins, and the problems to fix.

Doesn't import torch at its top, and turns each failure into a line of the report: it prints even if torch is broken or
there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comm_core._probe.attempt import try_query
from comm_core._probe.rank import Sources, probe_devices, probe_host, probe_versions
from comm_core.cli._integrations import examine_integrations
from comm_core.cli._report import PluginLine, Problem, Report, diagnose, render, to_json
from comm_core.cli._system import describe_crashes, describe_system
from comm_core.cli._terminal import show
from comm_core.env import PREFIX, Settings

if TYPE_CHECKING:
    from comm_core._plugins.discovery import Plugin
    from comm_core._testing.examine import PluginFault

__all__ = ["add_parser", "collect", "run"]

#: Other software's variables that affect the choice of backends.
_RELEVANT = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_",
    "NCCL_",
    "NVIDIA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="show the state of this host, torch and the plugins, and the problems to fix",
        description="Show versions, the host's identity, GPUs and their links, settings and plugins, and end with "
        "numbered fixes. Exits with 0 if there is nothing to fix, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if there is a problem to fix, else 0."""
    report = collect(Sources())
    problems = diagnose(report)
    if args.json:
        print(json.dumps(to_json(report, problems), indent=2))
    else:
        show(render(report, problems))
    return 1 if problems else 0


def collect(sources: Sources) -> Report:
    """Collect the facts of the report; never raises."""
    unknown: dict[str, str] = {}
    devices, driver = probe_devices(sources, unknown)
    versions = probe_versions(sources, unknown)
    settings = try_query(unknown, "settings", lambda: Settings.read(sources.environ))
    return Report(
        versions=versions | ({"driver": driver} if driver else {}),
        torch=_torch(sources, unknown) if "torch" in versions else {},
        system=describe_system(sources.environ, unknown),
        host=probe_host(sources, unknown),
        devices=devices,
        environment=_relevant_variables(sources.environ),
        settings=settings,
        misspelt=Settings.unknown(sources.environ),
        plugins=try_query(unknown, "plugins", lambda: _plugins(settings or Settings())) or (),
        crashes=try_query(unknown, "crashes", lambda: describe_crashes((settings or Settings()).cache_dir)) or (),
        integrations=try_query(unknown, "integrations", lambda: examine_integrations(settings or Settings())) or (),
        unknown=unknown,
    )


def _relevant_variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in sorted(environ) if name.startswith((PREFIX, *_RELEVANT))}


def _torch(sources: Sources, unknown: dict[str, str]) -> dict[str, Any]:
    torch = sources.torch()

    def groups() -> list[str]:
        distributed = torch.distributed
        if not distributed.is_available():
            return []
        return [name for name in ("gloo", "nccl") if getattr(distributed, f"is_{name}_available")()]

    usable = try_query(unknown, "torch.cuda", lambda: bool(torch.cuda.is_available())) or False
    if not usable:
        # Unlike is_available(), init() gives the reason.
        try_query(unknown, "torch.cuda", lambda: torch.cuda.init())  # noqa: PLW0108 - a broken torch may lack either name
    return {"cuda": usable, "process_groups": try_query(unknown, "torch.distributed", groups) or []}


def _plugins(settings: Settings) -> tuple[PluginLine, ...]:
    # Imported here, so that a broken discovery doesn't hide the rest of the report.
    from comm_core._plugins.discovery import discover

    def wanted(name: str) -> bool:
        return settings.may_import(name) and (settings.backends is None or name in settings.backends)

    found = discover(wanted, settings.import_timeout_s, settings.cache_dir)
    lines = [_examined_line(plugin, settings.import_timeout_s) for plugin in found.plugins.values()]
    lines += [
        PluginLine(item.name, item.distribution, item.version, usable=False, reason=item.reason, remedy=item.remedy)
        for item in found.failures.values()
    ]
    lines += [
        PluginLine(name, None, version, usable=None, reason="excluded by the environment")
        for name, version in found.listed.items()
        if not wanted(name)
    ]
    return tuple(sorted(lines, key=lambda line: line.name))


def _examined_line(plugin: Plugin, timeout_s: float) -> PluginLine:
    """Describe a loaded plugin, with its facts and its faults; it is usable unless its probe() fails."""
    from comm_core._testing.examine import examine_plugin

    line = PluginLine(plugin.name, plugin.distribution, plugin.version, usable=True)
    unknown: dict[str, str] = {}
    found = try_query(unknown, "faults", lambda: examine_plugin(plugin, timeout_s))
    if found is None:
        return dataclasses.replace(line, usable=False, reason=unknown["faults"], remedy="Reinstall comm-core.")
    if found.faults and not found.answers and plugin.has("probe") and found.facts is None:
        (fault,) = found.faults
        return dataclasses.replace(line, usable=False, reason=fault.what, remedy=_remedy(fault, plugin))
    missing = str(found.facts["missing"]) if isinstance(found.facts, dict) and found.facts.get("missing") else None
    on_cpus = [answer for name, answer in found.answers.items() if name.startswith("cpus-")]
    return dataclasses.replace(
        line,
        facts=found.facts,
        serves_cpus=any(answer.startswith("yes") or (missing and missing in answer) for answer in on_cpus),
        faults=tuple(Problem(fault.what, _remedy(fault, plugin)) for fault in found.faults),
    )


def _remedy(fault: PluginFault, plugin: Plugin) -> str:
    place = f" It is at {fault.place}." if fault.place else ""
    return f"{fault.remedy}{place} Or disable the plugin: COMM_CORE_DISABLE={plugin.name}."
