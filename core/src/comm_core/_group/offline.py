"""Decide for a recorded topology, without a process group."""

from __future__ import annotations

import dataclasses

import torch

from comm_core._group.local_inputs import answers_of, discover
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
    plugins = [found.plugins[name] for name in asked]
    answers = answers_of(plugins, topology, torch.device("cpu"), settings.control_timeout_s)
    encoded = {name: decide.encode_answer(answer) for name, answer in answers.items()}
    return decide.initial_slate(asked, [encoded], dropped).decision(topology.device_types)
