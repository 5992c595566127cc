"""The programs in benchmarks/, on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_way_of_a_decode_step_is_timed_and_correct(tmp_path: Path) -> None:
    record, picture = tmp_path / "step.json", tmp_path / "step.svg"
    output = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, BENCHMARKS / "decode_step.py"),
        *("--shape", "tiny", "--batches", "1,3", "--rounds", 3, "--replays", 1, "--json", record),
    )
    assert "# Wrong: 0" in output
    document = json.loads(record.read_text())
    rows = {(row["batch"], row["way"]): row for row in document["rows"]}
    assert rows.keys() == {(batch, way) for batch in (1, 3) for way in ("torch.distributed", "plain", "fused", "none")}
    assert rows[3, "plain"]["served_by"] == "shm"
    assert all(row["us"] > 0 for row in rows.values())
    assert all(0 < row["error"] < 0.05 for (_, way), row in rows.items() if way != "none")
    run(BENCHMARKS / "decode_step.py", "--read", record, "--plot", picture)
    assert 0 < picture.stat().st_size < 100_000


def test_the_costs_of_core_are_measured() -> None:
    command = [sys.executable, BENCHMARKS / "overhead.py", "--json", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    # It exits with 1 if a target is missed, as on a busy machine.
    assert done.returncode in (0, 1)
    assert done.stdout, done.stderr
    figures = {figure["name"] for figure in json.loads(done.stdout)["figures"]}
    assert {"handle's share of a call, out of place", "import comm_core after torch", "a handle's memory"} <= figures


def test_a_summary_has_the_medians_and_ratios_of_a_record(tmp_path: Path) -> None:
    record, summary, picture = (tmp_path / name for name in ("record.json", "summary.json", "picture.svg"))
    run(
        *("-m", "comm_core", "bench", "--nproc", 2, "-b", "1K", "-e", "2K", "-n", 3, "--place", "in"),
        *("--repetitions", 7, "--backends", "shm", "--json", record),
    )
    run(BENCHMARKS / "summarize.py", record, "--out", summary)
    whole, short = json.loads(record.read_text()), json.loads(summary.read_text())
    (table,) = short["tables"]
    assert table["cases"] == [1024, 2048]
    row = next(row for row in whole["rows"] if (row["name"], row["nbytes"]) == ("shm", 2048))
    assert table["us"]["shm"][1] == pytest.approx(row["time_us"], rel=0.01)
    ratio = table["times_as_fast"]["shm"]["torch_distributed"]
    assert [ratio["ratio"][1], ratio["low"][1]] == pytest.approx(
        [row["ratio"]["median"], row["ratio"]["low"]], abs=0.01
    )
    assert table["mean_times_as_fast_as_best"]["shm"] == pytest.approx(whole["summaries"][0]["mean"], rel=0.001)
    run(BENCHMARKS / "summarize.py", summary, "--plot", picture)
    assert picture.stat().st_size > 0


def test_a_tune_programs_summary_has_every_competitive_shape(tmp_path: Path) -> None:
    record, summary = tmp_path / "tune.json", tmp_path / "summary.json"
    lines = [
        {"tokens": tokens, "hidden": 4096, "row": row, "us": us, "wrong": ""}
        for tokens, times in ((1, (1.0, 2.0, 3.0)), (16, (1.5, 2.5, 3.5)))
        for row, us in zip(
            ("plain", f"push:cluster=2,blocks={2 * tokens}", "push:cluster=2,blocks=7"), times, strict=True
        )
    ]
    described = {"device": "a GPU", "torch": "2.11.0", "ranks": 2, "dtype": "bfloat16"}
    record.write_text(json.dumps({"schema": 1, **described, "lines": lines}))
    run(BENCHMARKS / "summarize.py", record, "--command", "tune", "--out", summary)
    (table,) = json.loads(summary.read_text())["tables"]
    assert table["cases"] == ["1x4096", "16x4096"]
    assert table["us"] == {
        "plain": [1, 1.5],
        "push:cluster=2,blocks=all": [2, 2.5],
        "push:cluster=2,blocks=7": [3, 3.5],
    }


def test_the_kept_summaries_are_small_and_without_wrong_results() -> None:
    summaries, pictures = (sorted(BENCHMARKS.glob(f"*.{kind}")) for kind in ("json", "svg"))
    assert summaries
    assert pictures
    for path in summaries:
        assert path.stat().st_size < 20_000, path
        document = json.loads(path.read_text())
        assert document["command"], path
        assert document["machine"]["versions"]["torch"], path
        assert document.get("wrong", 0) == 0, path
    assert all(path.stat().st_size < 100_000 for path in pictures)
