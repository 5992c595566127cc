"""Topologies of machines that may not be at hand: for `comm-core explain --topology NAME`, and to ask a backend about.

The JSON files have the form of a recording, and are written by hand; `machines` makes the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

from comm_core._schema import load_json
from comm_core._topologies import machines
from comm_core.topology import Topology

__all__ = ["describe_topologies", "load_topologies"]


def load_topologies() -> dict[str, Topology]:
    """Return the topologies by name: the files', then those of GPUs and of CPUs that `machines` makes."""
    recorded = {name: Topology.from_json(data) for name, data in _files()}
    made = {name: machine.topology() for name, machine in machines.MACHINES.items()}
    return recorded | made


def describe_topologies() -> dict[str, str]:
    """Return a line about each topology, by name, in the order of `load_topologies`."""
    recorded = {name: str(data["note"]) for name, data in _files()}
    made = {name: machine.note for name, machine in machines.MACHINES.items()}
    return recorded | made


def _files() -> Iterator[tuple[str, Any]]:
    """Yield the name and the JSON of each file."""
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            yield file.name.removesuffix(".json"), load_json(file.read_text(encoding="utf-8"))
