"""The measured rows as text and as JSON, and their summaries. Pure, without torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comm_core.types import TERMINAL

from comm_bench import stats
from comm_bench.cases import BenchCase, bus_factor

__all__ = ["HOP", "LAUNCH", "Row", "Summary", "format_row", "header", "summaries", "title", "with_ratios"]

_COLUMNS = (
    ("size", "(B)", 11),
    ("count", "(elements)", 11),
    ("type", "", 9),
    ("backend", "", 19),
    ("time", "(us)", 10),
    ("p10", "(us)", 10),
    ("p90", "(us)", 10),
    ("algbw", "(GB/s)", 8),
    ("busbw", "(GB/s)", 8),
    ("#wrong", "", 7),
    ("times as fast", f"as {TERMINAL}", 24),
)
#: The limits without a bandwidth.
HOP, LAUNCH = "limit:hop", "limit:launch"
# Decimals of the microseconds in the JSON: a tenth of a nanosecond.
_DECIMALS = 4
_LEAST_US = 10**-_DECIMALS
_LEFT = ("type", "backend", "times as fast")
# What a table leaves out where it doesn't fit the terminal, the first first.
_LEFT_OUT = ("p10", "p90", "count", "algbw", "type", "busbw")


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender on one case.

    Attributes:
        name: the contender's name.
        kind: "terminal", "backend", "peer" or "limit".
        case: the measured case.
        world_size: the number of ranks.
        calls: the number of calls in a chain.
        restarts: the number of restarts in a chain.
        copy_us: the time of one restart, already subtracted; 0 without restarts.
        spacer_us: the time of one spacer, already subtracted; 0 without spacers.
        times_us: the slowest rank's time of one call, by repetition.
        wrong: the number of wrong elements; None if nothing was compared.
        ratio: the terminal fallback's time over this one's; None for a limit, or if the fallback has no row.
        composed: whether a fused call was composed of the contender's plain sum and core's norm; not in the JSON.
    """

    name: str
    kind: str
    case: BenchCase
    world_size: int
    calls: int
    restarts: int
    copy_us: float
    spacer_us: float
    times_us: tuple[float, ...]
    wrong: int | None
    ratio: stats.Ratio | None = None
    composed: bool = False

    def __post_init__(self) -> None:
        # Copies and spacers are timed separately, so subtracting them can make the time of a very short call negative.
        times_us = tuple(max(time_us, _LEAST_US) for time_us in self.times_us)
        object.__setattr__(self, "times_us", times_us)

    @functools.cached_property
    def time(self) -> stats.Spread:
        """The median and spread of `times_us`."""
        return stats.spread(self.times_us)

    @property
    def algbw(self) -> float | None:
        """Bytes over time, in GB/s (1e9); None for a limit without a bandwidth."""
        return None if self.name in {HOP, LAUNCH} else self.case.nbytes / self.time.median / 1e3

    @property
    def busbw(self) -> float | None:
        """Bus bandwidth as nccl-tests define it, in GB/s (1e9); None if `algbw` is None."""
        return None if self.algbw is None else self.algbw * bus_factor(self.world_size)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON, including derived values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "op": self.case.op,
            "mode": self.case.mode,
            "place": self.case.place,
            "dtype": self.case.dtype,
            "shape": list(self.case.shape),
            "count": self.case.count,
            "nbytes": self.case.nbytes,
            "calls": self.calls,
            "restarts": self.restarts,
            "copy_us": round(self.copy_us, _DECIMALS),
            "spacer_us": round(self.spacer_us, _DECIMALS),
            "times_us": [round(time_us, _DECIMALS) for time_us in self.times_us],
            "time_us": self.time.median,
            "p10_us": self.time.p10,
            "p90_us": self.time.p90,
            # In GB/s, like the columns.
            "algbw": self.algbw,
            "busbw": self.busbw,
            "wrong": self.wrong,
            "ratio": None if self.ratio is None else dataclasses.asdict(self.ratio),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device_type: str, world_size: int) -> Row:
        """Read a row that `to_json` wrote; the device type and the world size are the document's."""
        case = BenchCase(data["op"], data["mode"], data["place"], data["dtype"], device_type, tuple(data["shape"]))
        return cls(
            **{name: data[name] for name in ("name", "kind", "calls", "restarts", "copy_us", "spacer_us", "wrong")},
            case=case,
            world_size=world_size,
            times_us=tuple(data["times_us"]),
            ratio=None if data["ratio"] is None else stats.Ratio(**data["ratio"]),
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """A backend compared with the fastest peer or torch.distributed at each size, in one table.

    Attributes:
        name: the backend's name.
        table: (op, mode, place, dtype).
        sizes: the number of sizes that the backend served.
        mean: the geometric mean over the sizes of the ratio of times, above 1 if the backend is faster.
        low: the lowest of the lower ends of the ratios' confidence intervals.
        lowest: the size of that interval, in bytes.
    """

    name: str
    table: tuple[str, str, str, str]
    sizes: int
    mean: float
    low: float
    lowest: int


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of one case with their ratios to the terminal fallback."""
    found = list(rows)
    reference = next((row for row in found if row.kind == "terminal"), None)
    if reference is None:
        return found
    return [
        row if row.kind == "limit" else dataclasses.replace(row, ratio=stats.ratio(row.times_us, reference.times_us))
        for row in found
    ]


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Summarise each backend in each table."""
    tables: dict[tuple[str, tuple[str, str, str, str]], list[tuple[stats.Ratio, int]]] = {}
    for row in rows:
        if row.kind == "backend":
            others = [other for other in rows if other.case == row.case and other.kind in {"terminal", "peer"}]
            if not others:
                continue
            best = min(others, key=lambda other: other.time.median)
            key = row.name, (row.case.op, row.case.mode, row.case.place, row.case.dtype)
            tables.setdefault(key, []).append((stats.ratio(row.times_us, best.times_us), row.case.nbytes))
    found = []
    for (name, table), ratios in tables.items():
        low, lowest = min((ratio.low, nbytes) for ratio, nbytes in ratios)
        mean = stats.geometric_mean(ratio.median for ratio, _ in ratios)
        found.append(Summary(name, table, len(ratios), mean, low, lowest))
    return found


def title(op: str, mode: str, place: str) -> str:
    """Return a table's title."""
    return f"{op}, {mode}, {'out of place' if place == 'out' else 'in place'}"


def header(columns: int | None = None) -> str:
    """Return the two lines above a table, in the manner of nccl-tests.

    Args:
        columns: the terminal's width, which decides what the table leaves out; None: nothing.
    """
    names = "#" + _joined([name for name, _, _ in _COLUMNS], columns)[1:]
    units = "#" + _joined([unit for _, unit, _ in _COLUMNS], columns)[1:]
    return f"{names}\n{units}"


def format_row(row: Row, columns: int | None = None) -> str:
    """Format a row as text; see `header`."""
    time = row.time
    compared = "" if row.ratio is None else f"{row.ratio.median:.3f} [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
    limit = row.kind == "limit"
    return _joined(
        [
            str(row.case.nbytes),
            str(row.case.count) if len(row.case.shape) == 1 else "x".join(map(str, row.case.shape)),
            row.case.dtype,
            row.name,
            f"{time.median:.2f}",
            f"{time.p10:.2f}",
            f"{time.p90:.2f}",
            "" if row.algbw is None else _format_bandwidth(row.algbw),
            "" if row.busbw is None else _format_bandwidth(row.busbw),
            "" if limit else "N/A" if row.wrong is None else str(row.wrong),
            compared,
        ],
        columns,
    )


def _format_bandwidth(gbps: float) -> str:
    return f"{gbps:.2f}" if gbps >= 1 else f"{gbps:.4f}"


def _joined(cells: Sequence[str], columns: int | None) -> str:
    left_out: set[str] = set()
    for name in _LEFT_OUT if columns is not None else ():
        if sum(width + 2 for column, _, width in _COLUMNS if column not in left_out) - 2 > (columns or 0):
            left_out.add(name)
    aligned = (
        cell.ljust(width) if name in _LEFT else cell.rjust(width)
        for cell, (name, _, width) in zip(cells, _COLUMNS, strict=True)
        if name not in left_out
    )
    return "  ".join(aligned).rstrip()
