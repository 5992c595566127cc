"""The record of a benchmark run: its JSON and its text. Pure, without torch.

`schema.json` beside this module describes the JSON (JSON Schema, draft 2020-12).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comm_bench.cases import BenchCase
from comm_bench.results import Row, Summary, format_row, header, summaries, title

__all__ = [
    "SCHEMA",
    "Listener",
    "footer",
    "heading",
    "preamble",
    "read_rows",
    "tables",
    "with_partial_results",
    "with_results",
]

#: The version of the JSON.
SCHEMA = 1
_TABLE_FIELDS = ("op", "mode", "place", "dtype")


class Listener:
    """Callbacks for the progress of a run. These do nothing."""

    def on_start(self, document: dict[str, Any]) -> None:
        """Called when all contenders are connected; the document has everything but the results."""

    def on_case_start(self, number: int, count: int, case: BenchCase) -> None:
        """Called before a case, the `number`-th of `count`."""

    def on_case_end(self, rows: Sequence[Row]) -> None:
        """Called after a case."""

    def on_drop(self, name: str, where: str, reason: str) -> None:
        """Called when a contender fails in a case that it supports."""


def with_results(document: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the document with its rows, summaries and number of wrong elements."""
    return {
        **document,
        "rows": [row.to_json() for row in rows],
        "summaries": [
            {**dataclasses.asdict(each), "table": dict(zip(_TABLE_FIELDS, each.table, strict=True))}
            for each in summaries(rows)
        ],
        "wrong": sum(row.wrong or 0 for row in rows),
    }


def with_partial_results(document: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the document of a run that Ctrl-C ended before its last case."""
    after = [{"unknown": "Ctrl-C ended the run"} for _ in document["clocks"]["before"]]
    clocks = {**document["clocks"], "after": after}
    return with_results({**document, "clocks": clocks, "partial": True}, rows)


def read_rows(document: Mapping[str, Any]) -> list[Row]:
    """Return a document's rows.

    Raises:
        ValueError: the document has another schema number, or comes from another program.
    """
    if document.get("schema") != SCHEMA:
        raise ValueError(f"it has schema {document.get('schema')!r}; this release reads {SCHEMA}")
    if not {"machine", "settings", "rows"} <= document.keys():
        raise ValueError("it isn't a file written by comm-core bench --json")
    machine = document["machine"]
    return [Row.from_json(row, machine["device_type"], machine["ranks"]) for row in document["rows"]]


def heading(document: Mapping[str, Any]) -> str:
    """Describe the machine in one line."""
    machine = document["machine"]
    versions = machine["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "nccl", "driver") if name in versions)
    devices = " and ".join(dict.fromkeys(machine["devices"])) or "CPU"
    return f"{machine['ranks']} ranks on {devices}; {named}"


def preamble(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines above the tables: the command, the machine and the method."""
    machine, settings = document["machine"], document["settings"]
    yield f"# comm-core {document['comm_core']}: {' '.join(document['command'])}"
    yield f"# {heading(document)}"
    if machine["devices"]:
        yield (
            f"# NVLinks {machine['nvlinks']}; L2 {machine['l2_nbytes'] >> 20} MiB, {machine['l2']}; dependent launch: "
            f"{machine['dependent_launch']}"
        )
        for rank, clocks in enumerate(document["clocks"]["before"]):
            yield f"# clocks of rank {rank}: " + ", ".join(f"{name} {value}" for name, value in clocks.items())
    yield "# Every call reads the previous call's output; the time of copies that restart a chain is subtracted."
    yield (
        f"# Times are medians of {settings['repetitions']} repetitions of the slowest rank's time, contenders in turn. "
        f"GB is 1e9. Brackets: {settings['confidence']:.1%} confidence interval."
    )
    for name, reason in document["absent"].items():
        yield f"# not measured: {name}: {reason}"


def tables(rows: Sequence[Row], columns: int | None = None) -> Iterator[str]:
    """Yield the rows as text, with a header above each table; `columns` as in `results.header`."""
    current = ""
    for row in rows:
        name = title(row.case.op, row.case.mode, row.case.place)
        if name != current:
            yield from ("", f"# {name}", header(columns))
            current = name
        yield format_row(row, columns)


def footer(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines below the tables: summaries and the number of wrong elements."""
    yield ""
    for data in document["summaries"]:
        each = Summary(**{**data, "table": tuple(data["table"][field] for field in _TABLE_FIELDS)})
        op, mode, place, dtype = each.table
        yield (
            f"# {each.name}, {title(op, mode, place)}, {dtype}: {each.mean:.3f} times as fast as the fastest of "
            f"torch.distributed and the peers (geometric mean of {each.sizes} sizes)"
        )
        yield f"#   lowest end of a confidence interval: {each.low:.3f}, at {each.lowest} B"
    if document.get("partial"):
        yield "# Partial: Ctrl-C ended the run before the last case."
    checked = "" if document["settings"]["checks"] else " (nothing was compared: -c 0)"
    yield f"# Wrong elements: {document['wrong']}{checked}"
