"""What `comm-core doctor` says of the installed integrations into serving engines."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from comm_core._control.deadline import run_with_deadline
from comm_core._plugins.installed import InstalledPlugin, LoadFailure, list_installed
from comm_core._plugins.metadata_backport import metadata
from comm_core._probe.attempt import try_query
from comm_core.cli._report import PluginLine
from comm_core.env import Settings

__all__ = ["examine_integrations"]

# The entry-point group of integrations into serving engines. An entry is a function that returns facts as JSON, as a
# plugin's `probe` does; the fact "missing" is a reason why it has no effect here.
_INTEGRATIONS = "comm_core.integrations"


def examine_integrations(settings: Settings) -> tuple[PluginLine, ...]:
    """Describe the installed integrations, with the facts that their entry points return."""
    return tuple(_integration_line(item, settings.import_timeout_s) for item in list_installed(_INTEGRATIONS))


def _integration_line(item: InstalledPlugin | LoadFailure, timeout_s: float) -> PluginLine:
    """Describe an integration; it is usable unless its function can't be imported, or fails."""
    line = PluginLine(item.name, item.distribution, item.version, usable=True)
    if isinstance(item, LoadFailure):
        return dataclasses.replace(line, usable=False, reason=item.reason, remedy=item.remedy)

    def ask() -> dict[str, Any]:
        function = metadata.EntryPoint(item.name, item.value, _INTEGRATIONS).load()
        facts = run_with_deadline(function, timeout_s, name=item.value)
        as_json: dict[str, Any] = json.loads(json.dumps(facts))
        return as_json

    failure: dict[str, str] = {}
    facts = try_query(failure, "facts", ask)
    if not failure:
        return dataclasses.replace(line, facts=facts)
    remedy = f"Reinstall or remove {item.distribution}."
    return dataclasses.replace(line, usable=False, reason=f"its {item.value} failed: {failure['facts']}", remedy=remedy)
