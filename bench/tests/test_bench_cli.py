"""The command line of `comm-core bench`: usage errors before any process starts, and recorded runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comm_bench import cli as bench
from comm_bench import stats
from comm_bench.cases import BenchCase
from comm_bench.document import SCHEMA, with_results
from comm_bench.results import Row, with_ratios
from comm_core import cli
from comm_core.types import DTYPES, QUANTS, TERMINAL


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """The launches that the command asks for; none is made."""
    calls: list[tuple[int, list[str]]] = []

    def launch(nproc: int, arguments: Any) -> int:
        calls.append((nproc, list(arguments)))
        return 0

    monkeypatch.setattr(bench, "launch", launch)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def parsed(*arguments: str) -> Any:
    """Parse the arguments as `run` gets them."""
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *arguments])


def measured(*arguments: str, device_type: str = "cpu") -> list[BenchCase]:
    """Return the cases that these arguments select."""
    return bench._cases(parsed(*arguments), device_type)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-b 1.5K", "argument -b: '1.5K' isn't a number of bytes such as 8, 64K, 1M or 2G"),
        ("-b -1", "argument -b"),
        ("-b 0", "-b"),
        ("-b 2K -e 1K", "-e"),
        ("-e 1T", "argument -e: '1T' isn't a number of bytes"),
        ("-f 1", "-f 1: sizes would stay the same; give a factor of at least 2, or a step with -i"),
        ("-f 0", "argument -f: '0' isn't a whole number of at least 1"),
        ("-i x", "argument -i: 'x' isn't a number of bytes"),
        ("-n 0", "argument -n: '0' isn't a whole number of at least 1"),
        ("-n many", "argument -n: 'many' isn't a whole number of at least 1"),
        ("-w 0", "argument -w: '0' isn't a whole number of at least 1"),
        ("-c 2", "argument -c: invalid choice: 2"),
        ("-d fp8", "argument -d: 'fp8': 'fp8' isn't one of all, half, float, double, float32"),
        ("-d half,", "argument -d: 'half,': '' isn't one of all, half"),
        ("-G -1", "argument -G"),
        ("-G x", "argument -G: 'x' isn't a whole number of at least 0"),
        ("--op sum", "argument --op: invalid choice: 'sum'"),
        ("--op fused -d int32,uint8", "-d int32,uint8: the fused operation needs a floating-point dtype"),
        ("--op fp8_static -d int8", "-d int8: the fused operation needs a floating-point dtype"),
        ("--op fused_quant --hidden 128,64", "--hidden 64: scales for groups need a multiple of 128"),
        ("--op fp8_per_group --hidden 64", "--hidden 64: scales for groups need a multiple of 128"),
        ("--place here", "argument --place: invalid choice: 'here'"),
        ("--tokens 1,0", "argument --tokens: '0' isn't a whole number of at least 1"),
        ("--tokens 1,,2", "argument --tokens: '' isn't a whole number of at least 1"),
        ("--hidden 0", "argument --hidden: '0' isn't a whole number of at least 1"),
        ("--repetitions 6", f"--repetitions 6: a confidence interval needs at least {stats.MIN_SAMPLES}"),
        ("--nproc 1", "a single rank has nothing to reduce; start at least two"),
        ("--nproc 0", "argument --nproc: '0' isn't a whole number of at least 1"),
        ("--json {folder}/nowhere/x.json", "can't write x.json: the folder {folder}/nowhere doesn't exist"),
        ("--plot {folder}/nowhere/x.png", "can't write x.png: the folder {folder}/nowhere doesn't exist"),
        ("--colour", "unrecognized arguments: --colour"),
        ("--tokens 1,2 -b 8", "--tokens takes the place of the sizes: leave -b, -e, -f and -i out"),
        ("--read {folder}/nofile", "--read {folder}/nofile can't be read: FileNotFoundError"),
    ],
)
def test_wrong_arguments_are_one_line_and_start_nothing(
    arguments: str, message: str, launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments.format(folder=tmp_path).split()])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    *usage, last = err.splitlines()
    assert message.format(folder=tmp_path) in last
    assert last.startswith("comm-core")
    assert usage[0].startswith("usage: comm-core")
    assert launched == []


def test_a_plot_without_matplotlib_says_what_to_install(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--plot", str(tmp_path / "x.png")])
    assert ended.value.code == 2
    assert "--plot needs matplotlib: pip install 'comm-bench[plot]'" in capsys.readouterr().err.splitlines()[-1]
    assert launched == []


def test_valid_arguments_are_passed_on_to_the_processes(launched: list[Any]) -> None:
    arguments = ["bench", "--nproc", "3", "-d", "half,double", "--json", "-b", "8"]
    assert cli.main(arguments) == 0
    assert launched == [(3, arguments)]


def test_dtypes_by_any_name() -> None:
    assert parsed("-d", "half,float,double").dtypes == ("float16", "float32", "float64")
    assert parsed("-d", "all").dtypes == tuple(DTYPES)
    assert parsed().dtypes == ("bfloat16",)


def test_a_dtype_that_is_named_twice_is_measured_once() -> None:
    cases = measured("-d", "float,float32", "-b", "1K", "-e", "1K")
    assert len(cases) == len(set(cases))


def test_the_sizes_of_the_tables() -> None:
    cases = measured("-b", "1K", "-e", "16K", "-f", "4")
    assert [(case.place, case.nbytes) for case in cases] == [
        (place, nbytes) for place in ("out", "in") for nbytes in (1024, 4096, 16384)
    ]
    steps = measured("-b", "1K", "-e", "3K", "-i", "1K", "--place", "in")
    assert [case.nbytes for case in steps] == [1024, 2048, 3072]
    assert {case.place for case in steps} == {"in"}
    assert max(case.nbytes for case in measured()) == 16 << 20
    assert max(case.nbytes for case in measured(device_type="cuda")) == 64 << 20


def test_modes() -> None:
    def modes(*arguments: str, device_type: str) -> list[str]:
        return list(dict.fromkeys(case.mode for case in measured(*arguments, device_type=device_type)))

    assert modes(device_type="cpu") == modes("-G", "0", device_type="cpu") == ["eager"]
    assert modes(device_type="cuda") == ["eager", "graph"]
    assert modes("-G", "0", device_type="cuda") == ["eager"]
    assert modes("-G", "3", device_type="cuda") == ["graph"]


def test_operations() -> None:
    def ops(*arguments: str) -> set[tuple[str, str]]:
        return {(case.op, case.dtype) for case in measured("-d", "int32,half", *arguments)}

    plain, fused = "all_reduce", "all_reduce_add_rms_norm"
    assert ops() == {(plain, "int32"), (plain, "float16")}
    # Integers have no fused operation, only the sum.
    assert ops("--op", "both") == {(plain, "int32"), (plain, "float16"), (fused, "float16")}
    for form in QUANTS:
        assert ops("--op", form) == {(f"{fused}_quant:{form}", "float16")}
        assert {case.quant for case in measured("--op", form)} == {form}
    assert ops("--op", "fused_quant") == {(f"{fused}_quant:{form}", "float16") for form in QUANTS}
    shapes = {case.shape for case in measured("--op", "fused", "--tokens", "1,3", "--hidden", "64,128")}
    assert shapes == {(1, 64), (3, 64), (1, 128), (3, 128)}


def test_graphs_on_cpus_are_a_usage_error(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "-G 2: only GPUs have CUDA graphs, and these ranks use CPUs"
    monkeypatch.setattr(bench, "enough_gpus", lambda _: False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "-G", "2", "-b", "1K", "-e", "1K"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert (out, launched) == ("", [])
    assert message in err
    # A rank of a job that torchrun started finds it only once it has its device.
    with pytest.raises(ValueError, match=message):
        measured("-G", "2")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A recorded run."""
    case = BenchCase("all_reduce", "eager", "out", "bfloat16", "cpu", (512,))
    reference = Row(TERMINAL, "terminal", case, 2, 5, 1, 0.5, 0.0, tuple(map(float, range(20, 27))), 0)
    mine = Row("mine", "backend", case, 2, 5, 1, 0.5, 0.0, tuple(map(float, range(10, 17))), 0)
    begun = {
        "schema": SCHEMA,
        "comm_core": "0.1.0",
        "started": "2026-01-02T03:04:05+00:00",
        "command": ["comm-core", "bench"],
        "machine": {"ranks": 2, "device_type": "cpu", "hosts": 1, "devices": [], "versions": {"torch": "2.13.0"}},
        "clocks": {"before": [{}, {}], "after": [{}, {}]},
        "settings": {
            "calls": 5,
            "launches": 1,
            "warmup": 5,
            "repetitions": 7,
            "checks": True,
            "confidence": stats.interval(7)[1],
        },
        "absent": {},
        "dropped": [],
    }
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps(with_results(begun, with_ratios([reference, mine]))))
    return path


def test_a_recorded_run_is_shown_and_starts_nothing(
    recorded: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--read", str(recorded)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "# 2 ranks on CPU; torch 2.13.0" in out
    assert "# all_reduce, eager, out of place" in out
    rows = [text.split() for text in out.splitlines() if not text.startswith("#") and text]
    assert [(row[3], row[4], row[9]) for row in rows] == [(TERMINAL, "23.00", "0"), ("mine", "13.00", "0")]
    assert "# Wrong elements: 0" in out
    assert launched == []


def test_a_recorded_run_is_written_again_as_it_was(
    recorded: Path, launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.json"
    assert cli.main(["bench", "--read", str(recorded), "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == json.loads(recorded.read_text())
    capsys.readouterr()
    assert cli.main(["bench", "--read", str(recorded), "--json"]) == 0
    # stdout has only JSON.
    assert json.loads(capsys.readouterr().out) == json.loads(recorded.read_text())


def test_a_recorded_run_is_drawn(recorded: Path, launched: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    assert cli.main(["bench", "--read", str(recorded), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recorded_run_with_wrong_elements_is_a_failure(recorded: Path, launched: list[Any]) -> None:
    document = json.loads(recorded.read_text())
    document["wrong"] = document["rows"][1]["wrong"] = 3
    recorded.write_text(json.dumps(document))
    assert cli.main(["bench", "--read", str(recorded)]) == 1


@pytest.mark.parametrize("output", [(), ("--json",)], ids=["text", "JSON"])
def test_a_closed_pipe_ends_a_recorded_run_quietly(recorded: Path, output: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has enough
    try:
        done = subprocess.run(
            [sys.executable, "-m", "comm_core", "bench", "--read", str(recorded), *output],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=200,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"schema": SCHEMA + 1}), f"it has schema {SCHEMA + 1}; this release reads {SCHEMA}"),
        (json.dumps({"schema": str(SCHEMA)}), f"it has schema '{SCHEMA}'"),
        (json.dumps({}), "it has schema None"),
        (json.dumps({"schema": SCHEMA}), "it isn't a file written by comm-core bench --json"),
        (json.dumps({"schema": SCHEMA, "machine": {"device_type": "cpu", "ranks": 2}, "rows": []}), ""),
        (json.dumps({"schema": SCHEMA, "machine": {"device_type": "cpu", "ranks": 2}, "rows": [{}]}), ""),
        (json.dumps({"schema": SCHEMA, "machine": [], "rows": []}), ""),
        ("[]", ""),
        ("null", ""),
        ("", "Expecting value"),
        ("no JSON", "Expecting value"),
        ("\x00\xff", ""),
        (None, "No such file"),
    ],
    ids=(
        *("newer", "text", "none", "bare", "no settings", "no fields", "no machine"),
        *("list", "null", "empty", "words", "bytes", "absent"),
    ),
)
def test_an_unreadable_file_is_reported_in_one_line(
    content: str | None, message: str, launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "garbage.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--read", str(path)])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, text = err.splitlines()
    assert f"--read {path} can't be read: " in text
    assert message in text
    assert launched == []


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, comm_bench.cli, comm_bench.document; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_two_recorded_runs_are_compared(
    recorded: Path, launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--compare", str(recorded), str(recorded)]) == 0
    assert "1.000 times as fast as before" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--compare", str(recorded), str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert f"--compare {tmp_path}/nowhere can't be read: FileNotFoundError" in capsys.readouterr().err
    assert launched == []
