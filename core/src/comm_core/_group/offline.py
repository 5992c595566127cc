"""Decides for a recorded topology, without a process group."""

from __future__ import annotations

import dataclasses

from comm_core._group.local_inputs import answer_of, discover
from comm_core._plan import decide
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology
from comm_core.types import Decision

__all__ = ["decide_offline"]


def decide_offline(topology: Topology) -> Decision:
    """What the backends installed here would say of `topology`. Local; connects nothing, so nothing can fail yet.

    Raises:
        ValueError: a setting of the environment can't be read.
    """
    settings = Settings.read()
    found, failures = discover(settings, settings.backends)
    here = dataclasses.replace(topology.ranks[0], plugins=found.listed)
    asked, dropped = decide.screen_candidates(
        [decide.Evidence(here, failures=failures)], settings.backends, settings.disable, f"{PREFIX}BACKENDS"
    )
    answers = {name: decide.encode_answer(answer_of(found.plugins[name], topology)) for name in asked}
    return decide.initial_slate(asked, [answers], dropped).decision(topology.device_types)
