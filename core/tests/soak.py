"""A soak test: random programs of random numbers of ranks, for as long as asked for, every bit checked.

`python core/tests/soak.py MINUTES [SEED]`, or `make soak MINUTES=10 SEED=7`. A run with the same seed takes the same
steps, as many as fit the time.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]

import soak_ranks
from harness import Ranks
from soak_ranks import Round

#: How much memory a process may take in the second half of its rounds, in KiB: their programs differ.
ALLOWED_KIB = 32 << 10
# In seconds.
_ROUND_S = 20.0


def run(ranks: Ranks, seed: int, seconds: float, round_s: float = _ROUND_S) -> list[list[Round]]:
    """Run rounds of 2 to 5 ranks until the time is over; return what each rank reported, by round."""
    chance = random.Random(seed)  # noqa: S311 - a test's data
    end, rounds = time.monotonic() + seconds, list[list[Round]]()
    while not rounds or time.monotonic() < end:
        size, number = chance.randint(2, 5), len(rounds)
        found = ranks.run(
            soak_ranks.soak, seed * 10_000 + number, round_s, world_size=size, installed=True, deadline_s=round_s + 240
        )
        rounds.append(found)
        done = ", ".join(f"{count} {what}" for what, count in sorted(found[0].done.items()))
        sums = sum(report.sums for report in found)
        most = max(report.resident_kib for report in found) >> 10
        print(f"round {number}: {size} ranks, {sums} sums, {done}; at most {most} MiB", flush=True)  # noqa: T201
    return rounds


def growth(rounds: list[list[Round]]) -> list[str]:
    """What processes hold more at a round's end than after its begin, and the memory that grows from round to round."""
    found = [
        f"process {report.pid}: {held - report.settled[kind]} more {kind} in round {number}"
        for number, reports in enumerate(rounds)
        for report in reports
        for kind, held in report.held.items()
        if held > report.settled[kind]
    ]
    by_process: dict[int, list[int]] = {}
    for report in (report for reports in rounds for report in reports):
        by_process.setdefault(report.pid, []).append(report.resident_kib)
    # The second half: allocators and caches settle late.
    halves = {pid: kib[len(kib) // 2 :] for pid, kib in by_process.items()}
    return found + [
        f"process {pid}: {(kib[-1] - kib[0]) >> 10} MiB more memory in the last {len(kib)} rounds"
        for pid, kib in halves.items()
        if kib[-1] - kib[0] > ALLOWED_KIB
    ]


def main(minutes: float, seed: int) -> int:
    print(f"seed {seed}: make soak MINUTES={minutes:g} SEED={seed}", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        pool = Ranks(Path(folder))
        try:
            rounds = run(pool, seed, minutes * 60)
        finally:
            pool.close()
    grown = growth(rounds)
    total = sum(report.sums for reports in rounds for report in reports)
    print(f"{len(rounds)} rounds, {total} sums, every bit right", *grown, sep="\n")  # noqa: T201
    return bool(grown)


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(float(given[0]) if given else 10.0, int(given[1]) if len(given) > 1 else time.time_ns() % 100_000))
