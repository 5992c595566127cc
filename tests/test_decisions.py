"""What the plugins of this repository decide on every machine that `comm-core explain --list` names.

The folder `decisions` has a readable file for each. After an intended change, write them anew and look at the
difference:

    python tests/test_decisions.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from comm_core._group.offline import decide_offline
from comm_core._plan.explain import explain
from comm_core._plugins import discovery
from comm_core._topologies import load_topologies
from comm_core.types import TERMINAL, Decision

FOLDER = Path(__file__).with_name("decisions")
PLUGINS = {"customar_v1", "customar_v2", "flashinfer_fusion", "nccl", "shm"}
TOPOLOGIES = load_topologies()


def decided(name: str) -> str:
    """Explain the decision for a machine, as if only the plugins of this repository were installed, in any version."""
    topology = TOPOLOGIES[name]
    made = decide_offline(topology).decision
    candidates = [
        dataclasses.replace(candidate, version=None)
        for candidate in made.candidates
        if candidate.name in {*PLUGINS, TERMINAL}
    ]
    return explain(name, topology, Decision(tuple(candidates), made.routes)) + "\n"


def write() -> None:
    """Write each machine's file, and remove those of machines that are gone."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    for name in TOPOLOGIES:
        (FOLDER / f"{name}.txt").write_text(decided(name), encoding="utf-8")


@pytest.fixture(autouse=True)
def _every_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting, and no list of plugins that another test left, hides a plugin."""
    for name in ("COMM_CORE_BACKENDS", "COMM_CORE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    discovery.reset()


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_machine_is_decided_as_recorded(name: str) -> None:
    recorded = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert decided(name) == recorded, "if that is intended: python tests/test_decisions.py"


def test_every_plugin_is_asked_and_every_recorded_machine_exists() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(TOPOLOGIES)
    names = {candidate.name for candidate in decide_offline(TOPOLOGIES["dgx-h100"]).decision.candidates}
    assert names >= PLUGINS


if __name__ == "__main__":
    write()
