"""Backends that read in each hook what their `probe` reported, one of which then changes that of all backends."""

from __future__ import annotations

from typing import Any

import comm_core as comm
from faulty_plugins import Good


class NeedsFacts(Good):
    @comm.hookimpl
    def probe(self) -> dict[str, Any]:
        return {"name": self.name}

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Any:
        self.read_facts(topology)
        return super().connect(topology, context)

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        self.read_facts(topology)
        return super().ask(topology)

    def read_facts(self, topology: comm.Topology) -> None:
        assert [info.facts[self.name] for info in topology.ranks] == [{"name": self.name}] * topology.world_size


class ClearsFacts(NeedsFacts):
    def read_facts(self, topology: comm.Topology) -> None:
        super().read_facts(topology)
        if self.faulty:
            for info in topology.ranks:
                facts: Any = info.facts
                for of_plugin in facts.values():
                    of_plugin.clear()
