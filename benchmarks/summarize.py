#!/usr/bin/env python3
"""Turn a record into a summary, and draw a summary. The repository keeps summaries only.

    python benchmarks/summarize.py RECORD [--command "HOW IT WAS MADE"] --out SUMMARY
    python benchmarks/summarize.py SUMMARY --plot PICTURE.svg

A record is the JSON output of `comm-core bench` or `add_rms_norm.py`. A summary is JSON: `command`, `machine`,
`settings` and `tables`. In a table, every list has one number for each of its `cases` (bytes, or tokens x hidden size),
or null:

    us              by contender: the slowest rank's median time of a call, in microseconds
    times_as_fast   by backend and reference; "best" is the fastest peer or torch.distributed in each case. `ratio` is
                    the median over repetitions, `low` the lower end of its confidence interval. For graphs, with their
                    small variation, "best" is the only reference: other ratios follow from `us`.
    us_over_launch  by backend, eager: the median over repetitions of its time minus that of an empty kernel

`mean_times_as_fast_as_best` has the geometric mean over the cases of the ratios to "best". The record of
`decode_step.py` is small enough to serve as a summary.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comm_bench import stats
from comm_bench.document import read_rows
from comm_bench.results import LAUNCH, Row, title

#: The largest size of a summary, in bytes.
MAX_NBYTES = 20_000
#: The machine's limits in a picture, and their labels.
LIMITS = {"limit:push": "the message's bytes, pushed", "limit:launch": "an empty kernel"}


def rounded(value: float | None, digits: int = 4) -> float | int | None:
    """Round to this many significant digits."""
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() else short


def summarize_bench(record: dict[str, Any]) -> dict[str, Any]:
    """Summarise a record of `comm-core bench --json`."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows(record):
        tables.setdefault((title(row.case.op, row.case.mode, row.case.place), row.case.dtype), []).append(row)
    known = ("ranks", "devices", "nvlinks", "versions")
    machine = {name: value for name, value in record["machine"].items() if name in known}
    return {
        "command": " ".join(record["command"]),
        "started": record["started"],
        "machine": machine,
        "settings": record["settings"],
        "absent": record["absent"],
        "dropped": record["dropped"],
        "wrong": record["wrong"],
        "tables": [bench_table(f"{name}, {dtype}", rows) for (name, dtype), rows in tables.items()],
    }


def bench_table(name: str, rows: list[Row]) -> dict[str, Any]:
    """Summarise the rows of one operation, mode, place and dtype."""
    by = {(row.name, row.case): row for row in rows}
    cases = list(dict.fromkeys(row.case for row in rows))
    kinds = {row.name: row.kind for row in rows}
    others = [other for other, kind in kinds.items() if kind in {"terminal", "peer"}]
    eager = cases[0].mode == "eager"
    # Eager times vary by percents, so fewer digits are meaningful.
    digits, decimals = (3, 2) if eager else (4, 3)

    def best(case: Any) -> Row | None:
        found = (by[other, case] for other in others if (other, case) in by)
        return min(found, key=lambda row: row.time.median, default=None)

    def pairs(backend: str, other: Callable[[Any], Row | None]) -> list[tuple[Row, Row] | None]:
        found = ((by.get((backend, case)), other(case)) for case in cases)
        return [None if mine is None or theirs is None else (mine, theirs) for mine, theirs in found]

    def ratios(found: list[tuple[Row, Row] | None]) -> list[stats.Ratio | None]:
        return [pair and stats.ratio(pair[0].times_us, pair[1].times_us) for pair in found]

    def compared(found: list[stats.Ratio | None]) -> dict[str, Any]:
        return {
            "ratio": [ratio and round(ratio.median, decimals) for ratio in found],
            "low": [ratio and round(ratio.low, decimals) for ratio in found],
        }

    table: dict[str, Any] = {
        "name": name,
        "cases": ["x".join(map(str, case.shape)) if len(case.shape) > 1 else case.nbytes for case in cases],
        "us": {
            each: [rounded(by[each, case].time.median, digits) if (each, case) in by else None for case in cases]
            for each in kinds
        },
        "mean_times_as_fast_as_best": {},
        "times_as_fast": {},
    }
    for backend in (each for each, kind in kinds.items() if kind == "backend"):
        against = {"best": ratios(pairs(backend, best))}
        mean = stats.geometric_mean(ratio.median for ratio in against["best"] if ratio)
        table["mean_times_as_fast_as_best"][backend] = rounded(mean)
        if eager:
            against |= {
                other: ratios(pairs(backend, lambda case, other=other: by.get((other, case)))) for other in others
            }
            table.setdefault("us_over_launch", {})[backend] = [
                pair
                and round(statistics.median(a - b for a, b in zip(*(row.times_us for row in pair), strict=True)), 2)
                for pair in pairs(backend, lambda case: by.get((LAUNCH, case)))
            ]
        table["times_as_fast"][backend] = {other: compared(found) for other, found in against.items() if any(found)}
    return table


def summarize_norms(record: dict[str, Any]) -> dict[str, Any]:
    """Summarise a record of `add_rms_norm.py --json`."""
    tables: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(line["dtype"] for line in record["lines"]):
        by = {
            (line["name"], f"{line['num_tokens']}x{line['hidden_size']}"): line
            for line in record["lines"]
            if line["dtype"] == dtype
        }
        names, cases = (list(dict.fromkeys(key[part] for key in by)) for part in (0, 1))
        tables.append(
            {
                "name": f"residual and norm, in place, graph, {dtype}",
                "cases": cases,
                "us": {name: [rounded(by[name, case]["us"][0]) for case in cases] for name in names},
                "times_as_fast": {
                    name: {
                        "torch": {
                            part: [round(by[name, case]["times_as_fast"][n], 3) for case in cases]
                            for n, part in enumerate(("ratio", "low"))
                        }
                    }
                    for name in names
                    if name != "torch"
                },
                "worst_error": {name: max(by[name, case]["worst"] for case in cases) for name in names},
            }
        )
    versions = {name: record[name] for name in ("torch", "cuda", "python")}
    return {"machine": {"ranks": 1, "devices": [record["device"]], "versions": versions}, "tables": tables}


def format_json(value: Any, indent: str = "") -> str:
    """Format JSON with a line for each list of numbers."""
    inner = indent + " "
    if isinstance(value, dict) and value and any(isinstance(each, dict | list) for each in value.values()):
        lines = [f"{inner}{json.dumps(name)}: {format_json(each, inner)}" for name, each in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(inner + format_json(each, inner) for each in value) + f"\n{indent}]"
    return json.dumps(value, separators=(",", ":") if isinstance(value, list) else None)


def summary_of(record: dict[str, Any], command: str | None) -> str:
    """Return a record's summary as text of at most `MAX_NBYTES`."""
    found = summarize_bench(record) if "rows" in record else summarize_norms(record)
    text = format_json({"schema": 1, "command": command or record.get("command"), **found}) + "\n"
    if len(text) < MAX_NBYTES:
        return text
    raise SystemExit(f"the summary has {len(text)} bytes, and the limit is {MAX_NBYTES}: record fewer cases")


def nbytes_of(case: str, name: str) -> int:
    """Return the bytes of a case "tokens x hidden size", in the dtype at the end of a table's name."""
    tokens, hidden = map(int, case.split("x"))
    return tokens * hidden * {"float64": 8, "float32": 4}.get(name.rpartition(" ")[2], 2)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw times over bytes, with a panel for each table and thick lines for backends."""
    from matplotlib.figure import Figure

    if "shapes" in summary:
        draw_steps(summary, path)
        return
    tables, machine = summary["tables"], summary["machine"]
    names = list(dict.fromkeys(name for table in tables for name in table["us"] if not name.startswith("limit:")))
    columns = min(2, len(tables))
    lines = -(-len(tables) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.5 * lines + 0.8), layout="constrained")
    versions = [f"{name} {machine['versions'][name]}" for name in ("torch", "nccl") if name in machine["versions"]]
    figure.suptitle(", ".join([f"{machine['ranks']} x {(machine['devices'] or ['CPU process'])[0]}", *versions]))
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, table in zip(panels, tables, strict=False):
        nbytes = [case if isinstance(case, int) else nbytes_of(case, table["name"]) for case in table["cases"]]
        for name, times in table["us"].items():
            points = sorted((size, us) for size, us in zip(nbytes, times, strict=True) if us is not None)
            style: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1}
            if name in names:
                number = names.index(name)
                style = {"color": f"C{number % 10}", "linestyle": ("-", "--", "-.")[number // 10], "linewidth": 1}
                style["linewidth"] = 2 if name in table["times_as_fast"] else 1
            elif name not in LIMITS:
                continue
            panel.plot(*zip(*points, strict=True), label=LIMITS.get(name, name), **style)
        panel.set(title=table["name"], xlabel="bytes", ylabel="us per call, the slowest rank's median")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize="x-small", ncols=2)
    save(figure, path)


def draw_steps(document: dict[str, Any], path: Path) -> None:
    """Draw the other ways' speed-up of a decode step over torch.distributed, with a panel for each shape."""
    from matplotlib.figure import Figure

    shapes, machine = document["shapes"], document["machine"]
    figure = Figure(figsize=(5.5 * len(shapes), 3.6), layout="constrained")
    named = [f"{name} {machine['versions'][name]}" for name in ("torch", "nccl") if name in machine["versions"]]
    devices = f"{machine['ranks']} x {machine['devices'][0] if machine['devices'] else 'CPU process'}"
    dtype = "FP8" if "quant" in document["settings"] else "bfloat16"
    figure.suptitle(f"One decode step, {dtype}, {', '.join([devices, *named])}", fontsize="medium")
    labels = {"plain": "all_reduce", "fused": "all_reduce_add_rms_norm", "none": "no communication"}
    if dtype == "FP8":
        labels = {"norm then quant": f"{labels['fused']}, quantize"}
        labels |= {"fused quant": "all_reduce_add_rms_norm_quant", "none": "no communication"}
    for panel, name in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes, strict=True):
        for number, (way, label) in enumerate(labels.items()):
            rows = [row for row in document["rows"] if (row["shape"], row["way"]) == (name, way)]
            heights = [row["times_as_fast"] for row in rows]
            ends = [[abs(row["times_as_fast"] - row["quartiles"][end]) for row in rows] for end in (0, 1)]
            places, color = [place + 0.28 * number for place in range(len(rows))], ("C0", "C1", "lightgray")[number]
            bars = panel.bar(places, heights, 0.26, yerr=ends, label=label, color=color, error_kw={"linewidth": 0.8})
            panel.bar_label(bars, fmt="%.2f", fontsize="x-small")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks([place + 0.28 for place in range(len(rows))], [f"batch {row['batch']}" for row in rows])
        panel.set(title=f"Llama-3 {name}, {shapes[name]['layers']} layers")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.axes[0].set_ylabel("times as fast as torch.distributed")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure. An SVG is kept small: letters as text, coordinates with two decimals, no indentation."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "comm-core", "svg.fonttype": "none"}):
        figure.savefig(path)
    if path.suffix == ".svg":
        path.write_text(re.sub(r"(\.\d\d)\d+|\n\s+", lambda found: found[1] or "\n", path.read_text()))


def main() -> int:
    """Read a record or a summary, then write or draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="a record, or with --plot a summary")
    parser.add_argument("--command", help="the record's command line, if the record doesn't have it")
    parser.add_argument("--out", type=Path, help="write the summary here")
    parser.add_argument("--plot", type=Path, help="draw the summary here; needs matplotlib")
    options = parser.parse_args()
    data = json.loads(options.file.read_text())
    if options.out:
        options.out.write_text(summary_of(data, options.command))
    if options.plot:
        draw(data, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
