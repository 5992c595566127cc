"""Two runs of the benchmark, compared row by row. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from comm_core.command import table

from comm_bench import stats
from comm_bench.cases import BenchCase
from comm_bench.results import Row, title

__all__ = ["compare"]


def compare(old: Sequence[Row], new: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a comparison: a table for each operation, mode and place, and means by contender.

    Where the ranges from p10 to p90 of a case's two times don't overlap, its ratio is marked by an asterisk.

    Args:
        old: the rows of the first run.
        new: the rows of the second run.
    """
    before = {_key(row): row for row in old}
    after = {_key(row): row for row in new}
    common = [key for key in before if key in after]
    for name in dict.fromkeys(map(_title, (before[key] for key in common))):
        lines = [("size", "type", "backend", "old us", "new us", "old/new")]
        ratios: dict[str, list[float]] = {}
        for key in common:
            one, other = before[key], after[key]
            if _title(one) == name:
                ratio = one.time.median / other.time.median
                ratios.setdefault(one.name, []).append(ratio)
                differs = one.time.p10 > other.time.p90 or one.time.p90 < other.time.p10
                times = (f"{one.time.median:.2f}", f"{other.time.median:.2f}", f"{ratio:.3f}{'*' if differs else ''}")
                lines.append((str(one.case.nbytes), one.case.dtype, one.name, *times))
        yield from ("", f"# {name}", table(lines), "")
        for contender, found in ratios.items():
            mean = stats.geometric_mean(found)
            yield f"# {contender}: {mean:.3f} times as fast as before (geometric mean of {len(found)} cases)"
    for what, rows in (("only in the old run", before.keys() - after), ("only in the new run", after.keys() - before)):
        names = sorted({name for name, _ in rows})
        if names:
            yield f"# {what}: {len(rows)} rows, of {', '.join(names)}"


def _key(row: Row) -> tuple[str, BenchCase]:
    return row.name, row.case


def _title(row: Row) -> str:
    return title(row.case.op, row.case.mode, row.case.place)
