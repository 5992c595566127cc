"""Decide for a topology that was recorded elsewhere or comes with core, without a process group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from comm_core._group.local_inputs import answers_of, discover, probe_plugins
from comm_core._plan import decide
from comm_core._plugins.discovery import Plugin
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology
from comm_core.types import Decision

__all__ = ["WhatIf", "decide_offline"]


@dataclasses.dataclass(frozen=True)
class WhatIf:
    """A decision, and the assumptions under which it holds.

    Attributes:
        decision: the decision.
        assumed: by backend, the facts that were assumed of every rank, as the topology has none of this backend.
        missing: by backend of `assumed`, the reason why it can't be used here; it was assumed that it can there.
    """

    decision: Decision
    assumed: Mapping[str, Any]
    missing: Mapping[str, str]


def decide_offline(topology: Topology) -> WhatIf:
    """Decide for `topology`, from the answers of the backends installed here. Local; connects and tests nothing.

    If no rank of the topology reported facts of a backend, those of this process are assumed, without the fact
    "missing": a dependency that this host lacks, such as a compiler, says nothing about another host.

    Raises:
        ValueError: an environment variable is invalid.
    """
    settings = Settings.read()
    found, failures = discover(settings, settings.backends)
    reported = {name for info in topology.ranks for name in info.facts}
    unreported = {name: plugin for name, plugin in found.plugins.items() if name not in reported}
    here, unusable = probe_plugins(unreported, torch.device("cpu"), settings.control_timeout_s)
    failures.update(unusable)
    missing = {name: str(facts["missing"]) for name, facts in here.items() if facts.get("missing")}
    assumed = {name: {**facts, "missing": None} if name in missing else facts for name, facts in here.items()}
    topology = _with_facts(topology, found.plugins, assumed)
    first = dataclasses.replace(topology.ranks[0], plugins=found.listed)
    asked, dropped = decide.screen_candidates(
        [decide.Evidence(first, failures=failures)],
        settings.backends,
        settings.disable,
        f"{PREFIX}BACKENDS",
        settings.plugins,
    )
    plugins = [found.plugins[name] for name in asked]
    answers = answers_of(plugins, topology, torch.device("cpu"), settings.control_timeout_s)
    encoded = {name: decide.encode_answer(answer) for name, answer in answers.items()}
    slate = dataclasses.replace(decide.initial_slate(asked, [encoded], dropped), tuning=settings.tuning)
    slate = slate.as_deterministic() if settings.deterministic else dataclasses.replace(slate, wire=settings.wire)
    return WhatIf(slate.decision(topology.device_types), assumed, missing)


def _with_facts(topology: Topology, plugins: Mapping[str, Plugin], facts: Mapping[str, Any]) -> Topology:
    """Return the topology in which every rank reports these facts, too, and the versions of their plugins."""
    versions = {name: plugins[name].version or "" for name in facts}
    ranks = (
        dataclasses.replace(info, plugins={**versions, **info.plugins}, facts={**facts, **info.facts})
        for info in topology.ranks
    )
    return Topology.of(ranks, topology.device_types)
