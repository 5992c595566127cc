"""Backends that say too much, or what no message can carry; each serves if it is installed without its fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comm_core as comm
from faulty_plugins import MAX_NBYTES, Good
from recording_plugins import PreparesNothing

#: An escape sequence that clears a terminal, and half a surrogate pair.
ESCAPES = "\x1b[2J\ud800"


#: Far more than an answer may have.
MANY_RANGES = tuple(comm.Range("all_reduce", max_nbytes=MAX_NBYTES, multiple_nbytes=1 + i) for i in range(2000))


class AsksForManyRanges(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        return comm.Available(self.priority, MANY_RANGES) if self.faulty else super().ask(topology)


class AsksForAHugePriority(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        return comm.Available(10**5000) if self.faulty else super().ask(topology)


class AsksWithAnObject(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        if not self.faulty:
            return super().ask(topology)
        return comm.Available(self.priority, (comm.Range("all_reduce"),), checks_operands=object())  # type: ignore[arg-type]


class AsksWithALongDeviceType(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        if not self.faulty:
            return super().ask(topology)
        return comm.Available(self.priority, (comm.Range("all_reduce", device_types=("x" * 100_000,)),))


class SaysNoWithEscapes(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        return comm.Unavailable(f"no{ESCAPES} link\nrank 7: forged" * 500) if self.faulty else super().ask(topology)


class ConnectRaisesEscapes(Good):
    def open(self, context: comm.GroupContext) -> Any:
        if self.faulty:
            raise OSError(f"no{ESCAPES} link\nforged")
        return super().open(context)


class ConnectTimesOutWithEscapes(Good):
    def open(self, context: comm.GroupContext) -> Any:
        if self.faulty:
            raise TimeoutError(f"no{ESCAPES} link\nforged")
        return super().open(context)


class ConnectVotesWithEscapes(Good):
    def open(self, context: comm.GroupContext) -> Any:
        agreement = context.control.agree(not self.faulty, f"no{ESCAPES} link\nforged")
        if not agreement.ok:
            raise OSError(str(agreement.reasons[1]))
        return super().open(context)


class ProbeIsDeep(Good):
    @comm.hookimpl
    def probe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for _ in range(17 * self.faulty):
            facts = {"": facts}
        return facts


class ProbeRepeatsAName(Good):
    @comm.hookimpl
    def probe(self) -> dict[Any, Any]:
        return {1: "a", "1": "b"} if self.faulty else {}


class ProbeTakesItsWholeRoom(Good):
    @comm.hookimpl
    def probe(self) -> dict[str, Any]:
        return {"path": "x" * 490}


class PreparesManyRanges(PreparesNothing):
    def prepared(self, session: Any, nbytes: int) -> Sequence[comm.Range] | None:
        super().prepared(session, nbytes)
        return MANY_RANGES if self.faulty else None
