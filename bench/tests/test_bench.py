"""The benchmark in real processes, with correct backends and with faulty ones that it must catch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench_faults import (
    AT,
    BESIDE,
    DELAY_S,
    FUSED,
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
    name_of,
    plant,
)
from bench_ranks import FLOATS, HIDDEN_SIZE, by_case, measured_nothing, measured_with, schema, wrong_by
from comm_bench.cases import OPS, pattern_of
from comm_core.types import DTYPES, TERMINAL
from command_ranks import commanded

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


def test_a_run_without_cases_is_an_error(ranks: Ranks) -> None:
    for text in ranks.run(measured_nothing):
        assert "there is no size to measure" in text
