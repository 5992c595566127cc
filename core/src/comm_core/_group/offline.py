"""Decide for a recorded topology, without a process group."""

from __future__ import annotations

import dataclasses

from comm_core._group.local_inputs import answer_of, discover
from comm_core._plan import decide
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology
from comm_core.types import Decision

__all__ = ["decide_offline"]


def decide_offline(topology: Topology) -> Decision:
    """Decide for `topology`, from the answers of the backends installed here. Local; connects and tests nothing.

    Raises:
        ValueError: an environment variable is invalid.
    """
    settings = Settings.read()
    found, failures = discover(settings, settings.backends)
    here = dataclasses.replace(topology.ranks[0], plugins=found.listed)
    asked, dropped = decide.screen_candidates(
        [decide.Evidence(here, failures=failures)], settings.backends, settings.disable, f"{PREFIX}BACKENDS"
    )
    answers = {name: decide.encode_answer(answer_of(found.plugins[name], topology)) for name in asked}
    return decide.initial_slate(asked, [answers], dropped).decision(topology.device_types)
