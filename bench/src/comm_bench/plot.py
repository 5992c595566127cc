"""Draw latency and bus bandwidth over bytes. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comm_core.command import size

from comm_bench.cases import bus_factor
from comm_bench.results import HOP, LAUNCH, Row, title

__all__ = ["draw"]

# A panel's size in inches.
_WIDTH, _HEIGHT = 8.0, 5.0
_MARKS = "os^vD<>pPX*h"


def draw(rows: Sequence[Row], path: Path, heading: str) -> None:
    """Write a picture with a row of two panels for each table and dtype.

    Args:
        rows: the measured rows.
        path: the file to write, in the format of its suffix.
        heading: the line above all panels.

    Raises:
        ImportError: matplotlib isn't installed.
        OSError: the file can't be written.
        ValueError: matplotlib can't write this format.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = title(row.case.op, row.case.mode, row.case.place), row.case.dtype
        tables.setdefault(key, []).append(row)
    names = list(dict.fromkeys(row.name for row in rows if row.kind != "limit"))
    # tab20 has ten strong colours, each followed by a pale one; use the strong ones first.
    palette = [colormaps["tab20"](number) for number in range(20)]
    colors = palette[::2] + palette[1::2]
    styles = {
        name: {"color": colors[number % len(colors)], "marker": _MARKS[number % len(_MARKS)]}
        for number, name in enumerate(names)
    }
    figure = Figure(figsize=(2 * _WIDTH, _HEIGHT * len(tables) + 0.5), layout="constrained")
    figure.suptitle(heading)
    panels: Any = figure.subplots(len(tables), 2, squeeze=False)
    for (latency, bandwidth), ((name, dtype), found) in zip(panels, tables.items(), strict=True):
        _panel(latency, found, styles, "time")
        _panel(bandwidth, found, styles, "busbw")
        latency.set_title(f"{name}, {dtype}: latency")
        bandwidth.set_title(f"{name}, {dtype}: bus bandwidth")
        latency.set_ylabel("us per call, median of the slowest rank; p10 to p90 shaded")
        bandwidth.set_ylabel("GB/s")
        latency.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=110)


def _panel(panel: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]], what: str) -> None:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.name, []).append(row)
    for name, unordered in lines.items():
        points = sorted(unordered, key=lambda row: row.case.nbytes)
        nbytes = [row.case.nbytes for row in points]
        style = styles.get(name)
        if style is not None:
            values = [row.time.median if what == "time" else row.busbw for row in points]
            panel.plot(nbytes, values, label=name, markersize=4, linewidth=1.2, **style)
            if what == "time":
                low, high = ([row.time.p10 for row in points], [row.time.p90 for row in points])
                panel.fill_between(nbytes, low, high, color=style["color"], alpha=0.15, linewidth=0)
    limit = _limit(rows)
    if limit:
        nbytes = sorted(limit)
        factor = bus_factor(rows[0].world_size)
        values = [limit[each] if what == "time" else each / limit[each] / 1e3 * factor for each in nbytes]
        panel.plot(nbytes, values, label="limit", color="black", linestyle="--", linewidth=1.0)
    launches = sorted((row.case.nbytes, row.time.median) for row in rows if row.name == LAUNCH)
    if launches and what == "time":
        panel.plot(*zip(*launches, strict=True), label="bare launch", color="black", linestyle=":", linewidth=1.0)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("message")
    panel.xaxis.set_major_formatter(lambda nbytes, _: size(round(nbytes)))
    panel.grid(visible=True, which="both", alpha=0.25)


def _limit(rows: Sequence[Row]) -> dict[int, float]:
    """Return a lower bound for the time of an all-reduce, in microseconds by size.

    On GPUs the bound is the longer of one hop and of the message at the highest bandwidth measured; on CPUs it is the
    time of the copy.
    """
    moves = [row for row in rows if row.kind == "limit" and row.algbw is not None]
    hops = {row.case.nbytes: row.time.median for row in rows if row.name == HOP}
    found: dict[int, float] = {}
    for row in moves:
        nbytes = row.case.nbytes
        found[nbytes] = min(row.time.median, found.get(nbytes, row.time.median))
    if hops and found:
        fastest = max(nbytes / time_us for nbytes, time_us in found.items())
        # A limit may be missing in a case.
        found = {nbytes: max(hops.get(nbytes, 0.0), nbytes / fastest) for nbytes in found}
    return found
