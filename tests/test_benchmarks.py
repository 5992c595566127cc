"""The programs in benchmarks/, on CPUs."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comm_bench.cases import BenchCase
from comm_bench.document import Listener
from comm_bench.measure import Procedure
from comm_bench.session import measure_all

if TYPE_CHECKING:
    from harness import Ranks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextlib.contextmanager
def loaded(program: str) -> Iterator[Any]:
    """Import a program; it can import others meanwhile."""
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        yield importlib.import_module(program)


def run(program: str, *arguments: object) -> int:
    """Run a program in this process; return its exit status."""
    with loaded(program) as module, mock.patch.object(sys, "argv", [program, *map(str, arguments)]):
        status: int = module.main()
    return status


def run_as_rank(program: str, *arguments: object) -> int:
    """Run a program as a rank of the current job, as if torchrun had started it, on CPUs."""
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    in_job = mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT)
    with in_job, mock.patch.object(torch.cuda, "device_count", return_value=0):
        return run(program, *arguments)


def other_bits() -> int:
    """Count the bytes in which the ranks' outputs of two ways differ: one byte on each rank."""
    outputs = (torch.ones(2, 16).to(torch.float8_e4m3fn), torch.ones(2, 1), torch.ones(2, 16, dtype=torch.bfloat16))
    others = tuple(output.clone() for output in outputs)
    others[dist.get_rank() * 2].view(torch.uint8)[-1, -1] ^= 1
    with loaded("decode_step") as program:
        wrong: int = program.count_other_bits(outputs, others)
    return wrong


def timed_us() -> float:
    """Time four runs by a clock that shows one second on the first rank, and two on the second."""
    readings = iter((10.0, 11.0 + dist.get_rank()))
    with (
        loaded("torchrun_job") as job,
        mock.patch.object(job, "time", SimpleNamespace(perf_counter=lambda: next(readings))),
    ):
        us: float = job.time_us(lambda: None, 4, on_gpu=False)
    return us


def record_of_two_sizes() -> dict[str, Any]:
    """Measure as `comm-core bench` does; return the record."""
    cases = [BenchCase("all_reduce", "eager", "in", "bfloat16", "cpu", (nbytes // 2,)) for nbytes in (1024, 2048)]
    procedure = Procedure(calls=3, launches=1, warmup=5, repetitions=7, checks=True)
    return measure_all(lambda _: cases, ["comm-core", "bench"], procedure, ("shm",), Listener())[0]


def test_every_way_of_a_decode_step_is_timed_and_correct(ranks: Ranks, tmp_path: Path) -> None:
    record, picture = tmp_path / "step.json", tmp_path / "step.svg"
    arguments = ("--shape", "tiny", "--batches", "1,3", "--rounds", 3, "--replays", 1, "--json", record)
    assert ranks.run(run_as_rank, "decode_step", *arguments, installed=True) == [0, 0]
    document = json.loads(record.read_text())
    assert document["wrong"] == 0
    rows = {(row["batch"], row["way"]): row for row in document["rows"]}
    assert rows.keys() == {(batch, way) for batch in (1, 3) for way in ("torch.distributed", "plain", "fused", "none")}
    assert rows[3, "plain"]["served_by"] == "shm"
    assert all(row["us"] > 0 for row in rows.values())
    assert all(0 < row["error"] < 0.05 for (_, way), row in rows.items() if way != "none")
    assert run("decode_step", "--read", record, "--plot", picture) == 0
    assert 0 < picture.stat().st_size < 100_000


def test_every_way_of_a_decode_step_in_fp8_is_timed_and_correct(ranks: Ranks, tmp_path: Path) -> None:
    record, picture = tmp_path / "step.json", tmp_path / "step.svg"
    arguments = ("--fp8", "--shape", "tiny", "--batches", "1,3", "--rounds", 3, "--replays", 1, "--json", record)
    assert ranks.run(run_as_rank, "decode_step", *arguments, installed=True) == [0, 0]
    document = json.loads(record.read_text())
    assert document["wrong"] == 0
    assert document["settings"]["quant"] == "fp8_per_token"
    rows = {(row["batch"], row["way"]): row for row in document["rows"]}
    ways = ("torch.distributed", "norm then quant", "fused quant", "none")
    assert rows.keys() == {(batch, way) for batch in (1, 3) for way in ways}
    # More than bfloat16's rounding, so it did quantise.
    assert all(0.01 < row["error"] < 0.1 for (_, way), row in rows.items() if way != "none")
    assert [way for (_, way), row in rows.items() if row.get("base") == "norm then quant"] == ["fused quant"] * 2
    assert run("decode_step", "--read", record, "--plot", picture) == 0
    assert 0 < picture.stat().st_size < 100_000


def test_other_bits_of_the_fused_quantisation_are_counted(ranks: Ranks) -> None:
    assert ranks.run(other_bits) == [2, 2]


def test_a_time_is_the_slowest_ranks(ranks: Ranks) -> None:
    assert ranks.run(timed_us) == [500_000.0, 500_000.0]


def test_the_costs_of_core_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with loaded("overhead") as overhead:
        monkeypatch.setattr(overhead, "WORLD_SIZES", (8, 64))
        monkeypatch.setattr(overhead, "ROUNDS", 3)
    # It exits with 1 if a target is missed, as on a busy machine.
    assert run("overhead", "--json", "--repeats", "1") in (0, 1)
    figures = {figure["name"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert figures >= {
        "handle's share of a call, out of place",
        "import comm_core after torch",
        "decide, 64 ranks over 8",
        "a handle's memory",
    }


def test_a_summary_has_the_medians_and_ratios_of_a_record(ranks: Ranks, tmp_path: Path) -> None:
    record, summary, picture = (tmp_path / name for name in ("record.json", "summary.json", "picture.svg"))
    whole = ranks.run(record_of_two_sizes, installed=True)[0]
    record.write_text(json.dumps(whole))
    assert run("summarize", record, "--out", summary) == 0
    short = json.loads(summary.read_text())
    (table,) = short["tables"]
    assert table["cases"] == [1024, 2048]
    row = next(row for row in whole["rows"] if (row["name"], row["nbytes"]) == ("shm", 2048))
    assert table["us"]["shm"][1] == pytest.approx(row["time_us"], rel=0.01)
    ratio = table["times_as_fast"]["shm"]["torch_distributed"]
    assert [ratio["ratio"][1], ratio["low"][1]] == pytest.approx(
        [row["ratio"]["median"], row["ratio"]["low"]], abs=0.01
    )
    assert table["mean_times_as_fast_as_best"]["shm"] == pytest.approx(whole["summaries"][0]["mean"], rel=0.001)
    assert run("summarize", summary, "--plot", picture) == 0
    assert picture.stat().st_size > 0


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


def test_padded_batches_are_timed(ranks: Ranks, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    sizes = ("--bucket", 8, "--rows", "1,3", "--hidden", 16, "--rounds", 1, "--replays", 1)
    assert ranks.run(run_as_rank, "padded", *sizes, "--json", record, installed=True) == [0, 0]
    document = json.loads(record.read_text())
    assert (document["program"], document["machine"]["ranks"]) == ("padded", 2)
    rows = document["rows"]
    ops = ("all_reduce", "all_reduce_add_rms_norm")
    assert [(row["op"], row["rows"]) for row in rows] == [(op, count) for op in ops for count in (1, 3)]
    assert all(row["ratio"] > 0 for row in rows)


def test_sums_over_the_wire_are_timed(ranks: Ranks, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    arguments = ("--mib", "0.01,1", "--rounds", 1, "--replays", 1, "--json", record)
    assert ranks.run(run_as_rank, "wire", *arguments, installed=True) == [0, 0]
    document = json.loads(record.read_text())
    assert (document["program"], document["machine"]["ranks"]) == ("wire", 2)
    assert [row["nbytes"] for row in document["rows"]] == [10484, 1 << 20]
    assert all(row["times_as_fast"] > 0 and not row["takes_wire"] for row in document["rows"])
