"""The fault matrix: every stage of a group's life, every fault, on the first, a middle and the last rank.

`python core/tests/fault_matrix.py` runs all of it and writes docs/faults.md; with names of stages it runs these, and
replaces their rows. test_fault_matrix.py runs a part.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]

import matrix_ranks
from faulty_plugins import install_kind
from harness import DEAD, RankError, Ranks
from matrix_plugins import FAULTS, NAME, STAGES, Faulty, applies

if TYPE_CHECKING:
    from matrix_ranks import Report

#: The deadline of every wait, in seconds.
DEADLINE_S = 5
#: How much later all ranks must know the outcome of a step, in seconds.
GRACE_S = 10
#: The steps that all ranks end alike.
TOGETHER = ("get", "prepare", "recover")
# A wait of twice the deadline: see the hook `capture_ctx`.
_TWICE = ("capture", "close")
# Most cells wait for a deadline, so several at once don't disturb each other.
_AT_ONCE = 5
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell, and what the ranks reported; None for a rank that was killed."""

    stage: str
    fault: str
    world_size: int
    culprit: int
    reports: tuple[Report | None, ...] = ()

    @property
    def live(self) -> dict[int, Report]:
        return {rank: report for rank, report in enumerate(self.reports) if report is not None}

    @property
    def label(self) -> str:
        return f"{self.stage}, {self.fault}, rank {self.culprit} of {self.world_size}"

    @property
    def late_s(self) -> float:
        """The longest time of a step, less its deadline, in seconds; of the ranks that core can release in time.

        A process that is stopped isn't, nor a rank that hangs in its own hook on the hot path, which has no deadline.
        """
        alone = self.fault == "SIGSTOP, then on" or (self.stage, self.fault) == ("hot path", "hang")
        return max(
            took - DEADLINE_S * (2 if step in _TWICE else 1)
            for rank, report in self.live.items()
            if not (alone and rank == self.culprit)
            for step, _, took in report.steps
        )


def positions(world_sizes: Sequence[int] = (2, 3)) -> Iterator[tuple[int, int]]:
    """World sizes and ranks: the first, the middle ones and the last."""
    return ((size, rank) for size in world_sizes for rank in range(size))


def run(
    ranks: Ranks,
    path: Path,
    stage: str,
    faults: Sequence[str],
    size: int,
    culprit: int,
    timeout_s: float = DEADLINE_S,
) -> list[Cell]:
    """Run the cells of one stage and one rank, in one job but for those that kill it."""
    env = dict.fromkeys(
        ("COMM_CORE_CONTROL_TIMEOUT_S", "COMM_CORE_CONNECT_TIMEOUT_S", "COMM_CORE_WAIT_TIMEOUT_S"), str(timeout_s)
    )
    kept = [fault for fault in faults if fault != "SIGKILL"]
    cells = []
    for job in (kept, ["SIGKILL"] if "SIGKILL" in faults else []):
        if not job:
            continue
        found = ranks.run(
            matrix_ranks.run_cells,
            [(stage, fault) for fault in job],
            culprit,
            world_size=size,
            path=[[path]] * size,
            env=env,
            deadline_s=90.0 * len(job) + 60,
            dying=[culprit] if job == ["SIGKILL"] else [],
        )
        for number, fault in enumerate(job):
            reports = tuple(None if reported == DEAD else reported[number] for reported in found)
            cells.append(Cell(stage, fault, size, culprit, reports))
    return cells


def problems(cell: Cell) -> list[str]:
    """The rules that a cell breaks; none if all is well."""
    found = list(_differences(cell))
    who = f"rank {cell.culprit}"
    for rank, report in cell.live.items():
        is_peer = rank != cell.culprit
        for name, (kind, text, _), _ in report.steps:
            if kind != "ok" and kind not in (_ERRORS if is_peer else _ERRORS + _OWN_ERRORS):
                found.append(f"rank {rank}: {name} raised {kind}: {text}")
            if kind != "ok" and is_peer and who not in text:
                found.append(f"rank {rank}: {name} doesn't name {who}: {text}")
        faults = {
            "a wrong sum": not report.right,
            "no group works afterwards": not report.works,
            f"left behind: {report.left}": report.left,
        }
        found += [f"rank {rank}: {fault}" for fault, is_there in faults.items() if is_there]
    return found


def _differences(cell: Cell) -> Iterator[str]:
    """What isn't alike on all ranks that are left, or blames another rank."""
    peers = {rank: report for rank, report in cell.live.items() if rank != cell.culprit}
    for step in TOGETHER:
        endings = {
            rank: tuple(kind for name, (kind, _, _), _ in report.steps if name == step)
            for rank, report in peers.items()
        }
        if len(set(endings.values())) > 1:
            yield f"{step} ended differently: {endings}"
    plans = {report.plan for report in cell.live.values() if report.plan}
    if len(plans) > 1:
        yield f"plans differ: {plans}"
    for verdict, reason, rank, _ in plans:
        is_dropped = verdict in ("failed", "unavailable")
        # Core doesn't know for whom a hook waits by its own means.
        is_named = rank in (cell.culprit, None) or f"rank {cell.culprit}" in reason or "hasn't returned" in reason
        if is_dropped and not is_named:
            yield f"the plan doesn't name rank {cell.culprit}: {reason}"


# The errors of this project; and those of a hook that reach its own rank's caller as they are.
_ERRORS = ("BackendUnavailableError", "CaptureError", "CommError", "CommTimeoutError", "NegotiationError")
_OWN_ERRORS = ("KeyboardInterrupt", "OutOfMemoryError", "SystemExit")


def outcome(cell: Cell) -> str:
    """What a rank without a fault saw, in a few words."""
    report = next(report for rank, report in cell.live.items() if rank != cell.culprit)
    raised = [f"`{step}` raises {kind}" for step, (kind, _, _), _ in report.steps if kind != "ok"]
    if report.plan and report.plan[0] in ("failed", "unavailable"):
        raised.append("dropped")
    return ", then ".join(dict.fromkeys(raised)) or "served"


def rows(cells: Sequence[Cell]) -> dict[tuple[str, str], str]:
    """The rows of the page's table, by stage and fault."""
    found: dict[tuple[str, str], str] = {}
    for stage, fault in itertools.product(STAGES, FAULTS):
        of_row = [cell for cell in cells if (cell.stage, cell.fault) == (stage, fault)]
        if of_row:
            seen = "; ".join(dict.fromkeys(map(outcome, of_row)))
            late = max(0.0, *(cell.late_s for cell in of_row))
            left = {kind for cell in of_row for report in cell.live.values() for kind in report.left}
            parts = (stage, fault, seen, str(len(of_row)), f"{late:.0f}", ", ".join(sorted(left)) or "nothing")
            found[stage, fault] = f"| {' | '.join(parts)} |"
    return found


def rows_of_page() -> dict[tuple[str, str], str]:
    """The rows of the written page, by stage and fault."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    cells = ((line, [cell.strip() for cell in line.split("|")]) for line in lines if line.startswith("| "))
    return {(cell[1], cell[2]): line for line, cell in cells if cell[1] in STAGES}


def page(table: dict[tuple[str, str], str]) -> str:
    """The page docs/faults.md, with these rows."""
    lines = [
        "# The fault matrix",
        "",
        "One rank fails once, at each stage of a group's life and in each way: this page lists the consequences for",
        "the other ranks. Each stage and fault has five cells, which are runs on CPUs: with 2 and with 3 processes,",
        "each rank fails in one cell. In every cell the remaining ranks end `get`, `prepare` and `recover` alike, with",
        "one plan or with an error that names the failing rank. A later sum is right or raises, a new group works, and",
        "no thread, descriptor or mapping is left.",
        "",
        "- *Served*: nothing changed. *Dropped*: the next backend serves. If cells differ, a semicolon separates",
        "  their outcomes.",
        "- Steps: `get` is `comm.get_backend`, `prepare` is `comm.pre_capture_init`, `call` and `sum` are",
        "  all-reduces.",
        "- The stage *vote* is the exchange after `connect`, by which all ranks agree that it worked.",
        f"- *Late* is the time by which the longest step exceeded its deadline: {DEADLINE_S} s, twice as long for",
        f"  `capture` and `close`. Up to {GRACE_S} s are accepted, since the machine is busy. Stopped processes and",
        "  hooks of the hot path don't count, since core can't release them.",
        "",
        "| stage | fault | the other ranks see | cells | late, s | left behind |",
        "|---|---|---|---|---|---|",
        *(table[key] for key in itertools.product(STAGES, FAULTS) if key in table),
        "",
        "A combination without a row can't occur: for example, a hook that returns nothing returns no wrong type.",
        "",
        "Core doesn't check results on the hot path, since a check would cost more than the call. So it doesn't",
        "notice if an admitted backend later sums wrongly or changes its input. A hook of the hot path has no",
        "deadline, either: if it hangs, its rank hangs with it, and the other ranks need a new group. `make faults`",
        "writes this page.",
        "",
    ]
    return "\n".join(lines)


def main(stages: Sequence[str]) -> int:
    """Run the stages' cells, those of each rank in processes of their own; return 1 if one breaks a rule."""
    begin, broken = time.monotonic(), list[str]()

    def run_position(position: tuple[int, int]) -> list[Cell]:
        size, culprit = position
        cells: list[Cell] = []
        with tempfile.TemporaryDirectory() as folder:
            pool = Ranks(Path(folder))
            path = install_kind(Path(folder) / "plugin", Faulty, NAME, 300)  # type: ignore[arg-type]
            try:
                for stage in stages:
                    faults = [fault for fault in FAULTS if applies(stage, fault)]
                    try:
                        found = run(pool, path, stage, faults, size, culprit)
                    except RankError as error:
                        broken.append(f"{stage}, rank {culprit} of {size}: {error}")
                        continue
                    cells += found
                    texts = [f"{cell.label}: {problem}" for cell in found for problem in problems(cell)]
                    texts += [f"{cell.label}: {cell.late_s:.1f} s late" for cell in found if cell.late_s > GRACE_S]
                    broken.extend(texts)
                    took = f"{time.monotonic() - begin:6.0f} s"
                    title = f"{took}  {stage}, rank {culprit} of {size}: {len(found)} cells"
                    print(title, *texts, sep="\n", flush=True)  # noqa: T201
            finally:
                pool.close()
        return cells

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        cells = [cell for found in threads.map(run_position, positions()) for cell in found]
    PAGE.write_text(page(rows_of_page() | rows(cells)), encoding="utf-8")
    print(f"{len(cells)} cells, {len(broken)} problems: {PAGE}", *broken, sep="\n")  # noqa: T201
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or STAGES))
