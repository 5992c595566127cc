"""The benchmark end to end: in real processes, with correct backends and with faulty ones that it must catch."""

from __future__ import annotations

import importlib.resources
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import jsonschema
import pytest
from bench_ranks import (
    AT,
    BESIDE,
    DELAY_S,
    FLOATS,
    FUSED,
    HIDDEN_SIZE,
    PLAIN,
    QUANTISED,
    Cached,
    CannotPrepare,
    Delayed,
    Early,
    EarlyLate,
    EveryDtype,
    EveryThirdCall,
    Fused,
    Honest,
    InPlace,
    LastElement,
    OneElement,
    OneStepOff,
    OnlyLate,
    OutMissed,
    OutOfPlace,
    Quantised,
    RaisesInPlace,
    ResidualLeftOut,
    Unmoved,
    WeightLeftOut,
    WrongNorm,
    WrongQuantisedSum,
    WrongResidual,
    WrongScale,
    by_case,
    measured_nothing,
    measured_with,
    name_of,
    plant,
    wrong_by,
)
from comm_bench.cases import OPS, pattern_of
from comm_core.types import DTYPES, TERMINAL
from command_ranks import commanded, printed

if TYPE_CHECKING:
    from harness import Ranks

# Faulty backends, and the places (out of, in place) in which they are wrong at `AT`.
PLAIN_FAULTS: dict[type[Honest], tuple[str, ...]] = {
    OneElement: ("out", "in"),
    LastElement: ("out", "in"),
    EveryThirdCall: ("out", "in"),
    InPlace: ("in",),
    OutOfPlace: ("out",),
    OutMissed: ("in",),
    Cached: ("out", "in"),
    Early: ("out", "in"),
    Honest: (),
}
FUSED_FAULTS: tuple[type[Honest], ...] = (WrongResidual, ResidualLeftOut, WrongNorm, WeightLeftOut)


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """The command's exit status and document, with all plain faults side by side."""
    folder = tmp_path_factory.mktemp("plain")
    arguments = f"-b {BESIDE} -e {AT} -f 4 -n 3 -w 1 --repetitions 7".split()
    path = [plant(folder, list(PLAIN_FAULTS))] * 2
    (status, document), other = ranks.run(commanded, arguments, str(folder / "x.json"), path=path)
    assert other == (status, document)
    return status, document


@pytest.fixture(scope="module")
def fused(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """Like `plain`, for the fused operation."""
    folder = tmp_path_factory.mktemp("fused")
    arguments = f"--op fused --hidden {HIDDEN_SIZE} -b {BESIDE} -e {AT} -f 4 -n 3 -w 1 --repetitions 7".split()
    path = [plant(folder, (*FUSED_FAULTS, Fused))] * 2
    results = ranks.run(commanded, arguments, str(folder / "x.json"), path=path)
    assert results[0] == results[1]
    return results[0]


def test_faults_of_the_quantised_operation_are_counted_in_each_form(ranks: Ranks, tmp_path: Path) -> None:
    faults = {OneStepOff: 3, WrongScale: 2, WrongQuantisedSum: 3}
    arguments = f"--op fused_quant --hidden {HIDDEN_SIZE} --place in -b {BESIDE} -e {AT} -f 4 -n 2 -w 1".split()
    arguments += ["--repetitions", "7"]
    path = [plant(tmp_path, (*faults, Quantised, Fused))] * 2
    (status, document), other = ranks.run(commanded, arguments, str(tmp_path / "x.json"), path=path)
    assert other == (status, document)
    assert status == 1
    schema().validate(document)
    assert document["dropped"] == []
    cases = {(op, "in", "bfloat16", size) for op in QUANTISED for size in (BESIDE, AT)}
    for kind, forms in faults.items():
        wrong = {key for key, row in by_case(document, kind).items() if row["wrong"]}
        assert wrong == {key for key in cases if key[0] in QUANTISED[-forms:] and key[3] == AT}
    right = {name_of(kind) for kind in (Quantised, Fused)} | {f"{name_of(kind)}+quantize" for kind in faults}
    right |= {TERMINAL, f"{name_of(Quantised)}+quantize"}
    for name in right:
        rows = [row for row in document["rows"] if row["name"] == name]
        assert {(row["op"], row["place"], row["dtype"], row["nbytes"]) for row in rows} == cases
        assert {row["wrong"] for row in rows} == {0}
    # It has no kernel for the whole call, so its own row is that composition.
    assert f"{name_of(Fused)}+quantize" not in {row["name"] for row in document["rows"]}


@pytest.mark.parametrize("kind", PLAIN_FAULTS)
def test_a_planted_fault_is_counted(kind: type[Honest], plain: tuple[int, dict[str, Any]]) -> None:
    status, document = plain
    assert status == 1
    places = PLAIN_FAULTS[kind]
    assert wrong_by(document, kind) == {
        (place, nbytes): nbytes == AT and place in places for place in ("out", "in") for nbytes in (BESIDE, AT)
    }


@pytest.mark.parametrize("kind", [*FUSED_FAULTS, Fused])
def test_a_planted_fault_of_the_fused_operation_is_counted(
    kind: type[Honest], fused: tuple[int, dict[str, Any]]
) -> None:
    status, document = fused
    assert status == 1
    assert wrong_by(document, kind) == {
        (place, nbytes): nbytes == AT and kind is not Fused for place in ("out", "in") for nbytes in (BESIDE, AT)
    }


def test_the_fallback_is_not_counted_wrong_for_them(plain: tuple[int, dict[str, Any]]) -> None:
    _, document = plain
    assert {row["wrong"] for row in by_case(document).values()} == {0}
    assert document["wrong"] == sum(row["wrong"] or 0 for row in document["rows"]) > 0


def test_one_wrong_element_of_one_rank_counts_once(plain: tuple[int, dict[str, Any]]) -> None:
    _, document = plain
    # Twelve calls are checked, and the end of the chain, where both ranks have the error.
    wrong = by_case(document, OneElement)[PLAIN, "out", "bfloat16", AT]["wrong"]
    assert 12 < wrong <= 12 + 2


@pytest.mark.parametrize(
    ("kind", "dtype", "places", "calls"),
    [
        # Only the end of the timed chain shows these.
        (OnlyLate, "bfloat16", ("out",), 5),
        # A chain of int8 restarts after less than 7 calls, so copies lie between.
        (EarlyLate, "int8", ("in",), 7),
        # With one call in a chain, every chain has the same data.
        (Unmoved, "bfloat16", ("out", "in"), 1),
    ],
)
def test_the_end_of_a_chain_is_compared(
    ranks: Ranks, tmp_path: Path, kind: type[Honest], dtype: str, places: tuple[str, ...], calls: int
) -> None:
    assert pattern_of(PLAIN, "int8", 2).length < 7 < pattern_of(PLAIN, "bfloat16", 2).length
    path = [plant(tmp_path, [kind, Honest])] * 2
    document, other = ranks.run(
        measured_with, {"dtypes": (dtype,), "places": places, "nbytes": (AT,), "calls": calls}, path=path
    )
    assert document == other
    assert wrong_by(document, kind) == {(place, AT): True for place in places}
    assert wrong_by(document, Honest) == {(place, AT): False for place in places}


def test_nothing_is_compared_without_checks(ranks: Ranks, tmp_path: Path) -> None:
    path = [plant(tmp_path, [LastElement])] * 2
    arguments = {"places": ("in",), "nbytes": (AT,), "checks": False, "repetitions": 1}
    unchecked, _ = ranks.run(measured_with, arguments, path=path)
    assert by_case(unchecked, LastElement)
    assert {row["wrong"] for row in unchecked["rows"]} == {None}
    assert unchecked["wrong"] == 0


def test_a_delay_on_one_rank_shows_in_the_rows_time(ranks: Ranks, tmp_path: Path) -> None:
    path = [plant(tmp_path, [Delayed, Honest])] * 2
    arguments = {"places": ("out",), "nbytes": (AT,), "calls": 3, "repetitions": 15}
    document, other = ranks.run(measured_with, arguments, path=path)
    assert document == other
    ((_, row),) = by_case(document, Delayed).items()
    ((_, honest),) = by_case(document, Honest).items()
    subtracted_us = row["restarts"] * row["copy_us"] / row["calls"]
    assert min(row["times_us"]) + subtracted_us >= DELAY_S * 1e6 - 0.001
    assert row["wrong"] == honest["wrong"] == 0
    # Only if the honest backend were delayed as long in four of the 15 repetitions would the intervals overlap.
    assert row["ratio"]["high"] < honest["ratio"]["low"]
    summaries = {each["name"]: each["mean"] for each in document["summaries"]}
    assert summaries[name_of(Delayed)] < summaries[name_of(Honest)]


def test_a_backend_that_raises_on_one_rank_is_left_out_from_that_case_on(ranks: Ranks, tmp_path: Path) -> None:
    path = [plant(tmp_path, [RaisesInPlace, Honest])] * 2
    arguments = {"warmup": 1, "calls": 3, "nbytes": (AT, BESIDE)}
    document, other = ranks.run(measured_with, arguments, path=path)
    assert document == other
    (dropped,) = document["dropped"]
    assert dropped["name"] == name_of(RaisesInPlace)
    assert dropped["where"] == f"all_reduce, eager, in place, bfloat16, {AT} B"
    assert dropped["reason"].startswith("rank 1: ")
    assert "an illegal access" in dropped["reason"]
    all_cases = set(by_case(document))
    assert set(by_case(document, Honest)) == all_cases
    assert set(by_case(document, RaisesInPlace)) == {case for case in all_cases if case[1] == "out"}
    assert document["wrong"] == 0


def test_a_backend_that_cannot_prepare_is_absent_and_the_others_are_measured(ranks: Ranks, tmp_path: Path) -> None:
    path = [plant(tmp_path, [CannotPrepare, Fused])] * 2
    arguments = {"ops": (FUSED,), "places": ("out",), "nbytes": (AT,), "repetitions": 1}
    document, other = ranks.run(measured_with, arguments, path=path)
    assert document == other
    assert (
        f"rank 1: pre_capture_init: MemoryError: no room for {AT // 2 // HIDDEN_SIZE} tokens"
        in (document["absent"][name_of(CannotPrepare)])
    )
    assert {row["name"] for row in document["rows"]} >= {TERMINAL, name_of(Fused)}
    assert name_of(CannotPrepare) not in {row["name"] for row in document["rows"]}


@pytest.mark.parametrize(
    ("world_size", "ops", "place", "dtypes"),
    [
        (2, OPS, "in", tuple(DTYPES)),
        (3, OPS[:2], "out", tuple(DTYPES)),
        (4, (PLAIN,), "in", ("bfloat16", "float64", "int8")),
    ],
)
def test_honest_backends_have_no_wrong_element_in_any_dtype(
    ranks: Ranks, tmp_path: Path, world_size: int, ops: tuple[str, ...], place: str, dtypes: tuple[str, ...]
) -> None:
    path = [plant(tmp_path, [EveryDtype])] * world_size
    arguments = {"dtypes": dtypes, "ops": ops, "places": (place,), "nbytes": (BESIDE,), "calls": 5}
    arguments |= {"warmup": 1, "repetitions": 1}
    document, *others = ranks.run(measured_with, arguments, world_size=world_size, path=path)
    assert others == [document] * (world_size - 1)
    kinds = {(op, dtype) for op in ops for dtype in dtypes if op == PLAIN or dtype in FLOATS}
    for kind in (None, EveryDtype):
        found = by_case(document, kind)
        assert {(op, dtype) for op, _, dtype, _ in found} == kinds
        assert {key: row["wrong"] for key, row in found.items() if row["wrong"]} == {}
    assert document["dropped"] == []
    # Some of the chains restarted.
    assert any(row["restarts"] > 1 for row in document["rows"])


@pytest.mark.parametrize(
    ("dtype", "calls", "world_size"),
    [
        # Almost the longest possible chains: their sums of 2^1021 and 3^36 are exact, and so must be the expected ones.
        ("float64", 1030, 2),
        ("int64", 37, 3),
        ("bfloat16", 250, 2),
    ],
)
def test_long_chains_are_exact_to_their_end(ranks: Ranks, dtype: str, calls: int, world_size: int) -> None:
    assert pattern_of(PLAIN, dtype, world_size).length >= calls
    arguments = {"dtypes": (dtype,), "places": ("in",), "nbytes": (BESIDE,), "calls": calls, "repetitions": 1}
    document, *_ = ranks.run(measured_with, arguments, world_size=world_size)
    (row,) = by_case(document).values()
    assert (row["calls"], row["restarts"], row["wrong"]) == (calls, 1, 0)


# The command as users run it.


def environment(path: Sequence[Path] = ()) -> dict[str, str]:
    left_out = ("COMM_CORE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    folders = [
        *map(str, path),
        str(Path(__file__).parent),
        str(Path(harness.__file__).parent),
        *filter(None, [environ.get("PYTHONPATH")]),
    ]
    environ |= {"PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return environ | {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}


def bench(*arguments: str, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comm_core", "bench", *arguments],
        env=environment(path),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def schema() -> jsonschema.Draft202012Validator:
    text = importlib.resources.files("comm_bench").joinpath("schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def check_document(document: dict[str, Any], ranks: int, ops: Sequence[str], calls: int) -> None:
    """Validate a document against the schema, and check the tables of a run over two sizes."""
    schema().validate(document)
    assert document["machine"]["ranks"] == ranks
    assert document["machine"]["device_type"] == "cpu"
    assert document["clocks"] == {"before": [{}] * ranks, "after": [{}] * ranks}
    assert document["dropped"] == []
    expected = {(op, place, nbytes) for op in ops for place in ("out", "in") for nbytes in (1024, 4096)}
    for name in (TERMINAL, "limit:copy", name_of(Fused)):
        rows = [row for row in document["rows"] if row["name"] == name]
        assert {(row["op"], row["place"], row["nbytes"]) for row in rows} == expected
        assert len(rows) == len(expected)
        for row in rows:
            assert len(row["times_us"]) == 7
            assert row["calls"] == calls
            assert row["busbw"] == pytest.approx(row["nbytes"] / row["time_us"] / 1e3 * 2 * (ranks - 1) / ranks)
            assert row["wrong"] == (None if row["kind"] == "limit" else 0)
    for row in document["rows"]:
        if row["kind"] == "terminal":
            assert (row["ratio"]["low"], row["ratio"]["high"]) == (1, 1)
    tables = {(each["name"], each["table"]["op"], each["table"]["place"]) for each in document["summaries"]}
    assert tables >= {(name_of(Fused), op, place) for op in ops for place in ("out", "in")}


SMALL = ("-b", "1K", "-e", "4K", "-f", "4", "-n", "2", "-w", "1", "--repetitions", "7")


def test_the_command_on_cpus(tmp_path: Path) -> None:
    """With a faulty backend, and without numpy, which torch doesn't install; torch looks for it when it is imported."""
    path = tmp_path / "x.json"
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "numpy.py").write_text("raise ModuleNotFoundError('blocked')\n")
    done = bench(
        *("--nproc", "2", *SMALL, "--op", "both", "--hidden", str(HIDDEN_SIZE), "--json", str(path)),
        path=[*plant(tmp_path, [Fused, LastElement]), tmp_path / "without"],
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    document = json.loads(path.read_text())
    check_document(document, 2, OPS[:2], 2)
    wrong = {(row["name"], row["nbytes"]) for row in document["rows"] if row["wrong"]}
    assert wrong == {(name_of(LastElement), AT)}
    assert document["wrong"] == sum(row["wrong"] or 0 for row in document["rows"])
    lines = done.stdout.splitlines()
    titles = [f"# {op}, eager, {place}" for op in OPS[:2] for place in ("out of place", "in place")]
    assert [line for line in lines if line in titles] == titles
    shown = [line.split() for line in lines if line and not line.startswith("#")]
    # The printed rows are the recorded ones, in the same order.
    assert [(row[0], row[2], row[3], row[4]) for row in shown] == [
        (str(row["nbytes"]), row["dtype"], row["name"], f"{row['time_us']:.2f}") for row in document["rows"]
    ]
    assert f"# Wrong elements: {document['wrong']}" in lines


def test_the_command_as_three_ranks_of_a_job(ranks: Ranks, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    pytest.importorskip("matplotlib")
    arguments = ["bench", *SMALL, "--json", "--plot", str(picture)]
    path = [plant(tmp_path, [Fused])] * 3
    first, *others = ranks.run(printed, "comm_bench.cli", arguments, world_size=3, installed=True, path=path)
    status, out, err = first
    assert status == 0, err
    assert [other[:2] for other in others] == [(0, "")] * 2
    # stdout has only JSON.
    document = json.loads(out)
    check_document(document, 3, [PLAIN], 2)
    assert document["wrong"] == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    # Two tables, each with a row of two panels.
    assert 1000 < width < 4000
    assert 800 < height < 3000
    assert len(data) > 50_000


def test_an_unknown_contender_is_a_usage_error_of_one_rank(ranks: Ranks) -> None:
    (status, out, err), other = ranks.run(printed, "comm_bench.cli", ["bench", "--backends", "nosuch"], installed=True)
    assert (status, out) == (2, "")
    assert err.count("error: no installed backend or peer has the name nosuch; choose from ") == 1
    assert other == (2, "", "")


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    command = [sys.executable, "-m", "comm_core", "bench", "--repetitions", "7", "--json", str(path)]
    running = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.lstrip()[:1].isdigit():  # a row
            break
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, stderr = running.communicate(timeout=240)
    assert running.returncode == 130
    assert len(stderr.splitlines()) <= 1  # that the machine is busy
    document = json.loads(path.read_text())
    schema().validate(document)
    assert document["partial"]
    assert document["rows"]


def test_a_run_without_cases_is_an_error(ranks: Ranks) -> None:
    for text in ranks.run(measured_nothing):
        assert "there is no size to measure" in text
