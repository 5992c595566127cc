"""The programs in benchmarks/, on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_way_of_a_decode_step_is_timed_and_right(tmp_path: Path) -> None:
    record, picture = tmp_path / "step.json", tmp_path / "step.svg"
    said = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, BENCHMARKS / "decode_step.py"),
        *("--shape", "tiny", "--batches", "1,3", "--rounds", 3, "--replays", 1, "--json", record),
    )
    assert "# Wrong: 0" in said
    document = json.loads(record.read_text())
    rows = {(row["batch"], row["way"]): row for row in document["rows"]}
    assert rows.keys() == {(batch, way) for batch in (1, 3) for way in ("torch.distributed", "plain", "fused", "none")}
    assert rows[3, "plain"]["served_by"] == "shm"
    assert all(row["us"] > 0 for row in rows.values())
    assert all(0 < row["error"] < 0.05 for (_, way), row in rows.items() if way != "none")
    run(BENCHMARKS / "decode_step.py", "--read", record, "--plot", picture)
    assert 0 < picture.stat().st_size < 100_000
