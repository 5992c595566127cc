"""What a run of the benchmark is recorded as: its JSON, and its text. Pure, without torch.

`schema.json` beside this module describes the JSON (JSON Schema, draft 2020-12).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comm_bench.cases import BenchCase
from comm_bench.results import Row, Summary, header, line, summaries, title

__all__ = ["SCHEMA", "Listener", "closed", "footer", "heading", "preamble", "read_rows", "tables"]

#: The version of the JSON.
SCHEMA = 1
_TABLE = ("op", "mode", "place", "dtype")


class Listener:
    """Hears how a run goes on; this one says nothing."""

    def begins(self, document: dict[str, Any]) -> None:
        """Everybody is there; the document has all but its results."""

    def measures(self, number: int, count: int, case: BenchCase) -> None:
        """A case is begun."""

    def measured(self, rows: Sequence[Row]) -> None:
        """A case is done."""

    def drops(self, name: str, where: str, reason: str) -> None:
        """A contender can't do a case that it should have taken."""


def closed(document: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The document with its rows and what follows from them."""
    return {
        **document,
        "rows": [row.to_json() for row in rows],
        "summaries": [
            {**dataclasses.asdict(each), "table": dict(zip(_TABLE, each.table, strict=True))}
            for each in summaries(rows)
        ],
        "wrong": sum(row.wrong or 0 for row in rows),
    }


def read_rows(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a document.

    Raises:
        ValueError: its schema's number isn't this release's, or another program wrote it.
    """
    if document.get("schema") != SCHEMA:
        raise ValueError(f"it has schema {document.get('schema')!r}; this release reads {SCHEMA}")
    if not {"machine", "settings", "rows"} <= document.keys():
        raise ValueError("it isn't what comm-core bench --json writes")
    machine = document["machine"]
    return [Row.from_json(row, machine["device_type"], machine["ranks"]) for row in document["rows"]]


def heading(document: Mapping[str, Any]) -> str:
    """The machine in a line."""
    machine = document["machine"]
    versions = machine["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "nccl", "driver") if name in versions)
    devices = " and ".join(dict.fromkeys(machine["devices"])) or "CPU"
    return f"{machine['ranks']} ranks on {devices}; {named}"


def preamble(document: Mapping[str, Any]) -> Iterator[str]:
    """What is said of machine and method above the tables."""
    machine, settings = document["machine"], document["settings"]
    yield f"# comm-core {document['comm_core']}: {' '.join(document['command'])}"
    yield f"# {heading(document)}"
    if machine["devices"]:
        yield (
            f"# NVLinks {machine['nvlinks']}; L2 {machine['l2_nbytes'] >> 20} MiB, {machine['l2']}; dependent launch: "
            f"{machine['dependent_launch']}"
        )
        for rank, found in enumerate(document["clocks"]["before"]):
            yield f"# clocks of rank {rank}: " + ", ".join(f"{name} {value}" for name, value in found.items())
    yield "# Every call reads what the one before it wrote; copies that start a chain anew are subtracted."
    yield (
        f"# Medians of {settings['repetitions']} repetitions in turns, each the slowest rank's; GB is 1e9; brackets: a "
        f"confidence interval of {settings['confidence']:.1%}."
    )
    for name, reason in document["absent"].items():
        yield f"# without {name}: {reason}"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as text, a header above each table."""
    above = ""
    for row in rows:
        name = title(row.case.op, row.case.mode, row.case.place)
        if name != above:
            yield from ("", f"# {name}", header())
            above = name
        yield line(row)


def footer(document: Mapping[str, Any]) -> Iterator[str]:
    """What follows from the rows, below the tables."""
    yield ""
    for data in document["summaries"]:
        each = Summary(**{**data, "table": tuple(data["table"][field] for field in _TABLE)})
        op, mode, place, dtype = each.table
        yield (
            f"# {each.name}, {title(op, mode, place)}, {dtype}: {each.mean:.3f} times as fast as the best other one of "
            f"each size, {each.sizes} in all (geometric mean)"
        )
        yield f"#   its interval's lower end is lowest at {each.lowest} B: {each.low:.3f}"
    checked = "" if document["settings"]["checks"] else " (nothing was compared: -c 0)"
    yield f"# Wrong elements: {document['wrong']}{checked}"
