"""Rows, tables and summaries."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from comm_bench import stats
from comm_bench.cases import OPS, BenchCase
from comm_bench.compare import compare
from comm_bench.results import HOP, LAUNCH, Row, format_row, header, summaries, with_ratios
from comm_core.types import DTYPES, MODES, TERMINAL
from hypothesis import given
from hypothesis import strategies as st
from made_up_bench import REPETITIONS, STEP_US, document, row, sized


def test_bandwidths_are_as_in_nccl_tests() -> None:
    found = row(time_us=1000.0)
    # 2e6 bytes in 1 ms are 2 GB/s; over four ranks the bus bandwidth is 2·3/4 of that.
    assert found.algbw == pytest.approx(2.0)
    assert found.busbw == pytest.approx(3.0)
    assert dataclasses.replace(found, world_size=2).busbw == pytest.approx(2.0)


@pytest.mark.parametrize("name", [HOP, LAUNCH])
def test_hop_and_launch_have_no_bandwidth(name: str) -> None:
    assert row(name).algbw is None
    assert row(name).busbw is None
    assert row("limit:copy").busbw is not None


def test_the_columns_are_as_in_nccl_tests() -> None:
    names, units = header().splitlines()
    assert max(map(len, header(80).splitlines())) <= 80
    assert "algbw" in header(120)
    assert "p10" not in header(120)
    assert names.startswith("#")
    assert units.startswith("#")
    assert names[1:].split()[:10] == [
        "size",
        "count",
        "type",
        "backend",
        "time",
        "p10",
        "p90",
        "algbw",
        "busbw",
        "#wrong",
    ]
    assert units[1:].split()[:7] == ["(B)", "(elements)", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)"]
    times = tuple(float(value) for value in range(1000, 1011))
    reference = row(times_us=tuple(2 * value for value in times))
    _, found = with_ratios([reference, row("mine", times_us=times, wrong=3)])
    cells = [
        "2000000",
        "1000000",
        "bfloat16",
        "mine",
        "1005.00",
        "1001.00",
        "1009.00",
        "1.99",
        "2.99",
        "3",
        "2.000",
        "[2.000,",
        "2.000]",
    ]
    assert format_row(found).split() == cells
    # Each cell is under its column's name: numbers are aligned right, words left.
    text = format_row(found)
    for name, cell in zip(
        ["size", "count", "time", "p10", "p90", "algbw", "busbw", "#wrong"], [*cells[:2], *cells[4:10]], strict=True
    ):
        end = names.index(name) + len(name)
        assert text[:end].endswith(cell), name
    for name, cell in (("type", "bfloat16"), ("backend", "mine"), ("times as fast", "2.000 [")):
        assert text[names.index(name) :].startswith(cell)


def test_a_row_that_wasnt_compared_has_no_number_of_wrong_elements() -> None:
    assert " N/A" in format_row(row(wrong=None))
    limit = format_row(row("limit:copy"))
    assert "N/A" not in limit
    assert "[" not in limit


def test_a_fused_case_shows_its_rows() -> None:
    case = BenchCase("all_reduce_add_rms_norm", "eager", "in", "float32", "cpu", (8, 64))
    assert format_row(row(case=case)).split()[:3] == ["2048", "8x64", "float32"]


def test_rows_of_a_case_are_compared_with_the_fallback() -> None:
    found = with_ratios([row(time_us=10.0), row("mine", 5.0), row("limit:copy", 1.0), row("peer", 20.0)])
    assert [each.ratio and each.ratio.median for each in found] == [1.0, 2.0, None, 0.5]
    assert all(each.ratio is None or each.ratio.confidence == stats.interval(REPETITIONS)[1] for each in found)


def test_a_summary_is_against_the_best_other_of_each_size() -> None:
    small = [row(time_us=10.0), row("mine", 5.0), row("other", 1.0), row("peer", 8.0), row("limit:copy", 0.5)]
    large = [row(time_us=10.0), row("mine", 5.0), row("peer", 40.0)]
    rows = [*with_ratios(sized(each, 512) for each in small), *with_ratios(sized(each, 1024) for each in large)]
    found = {each.name: each for each in summaries(rows)}
    # The summary ignores other backends and limits: 8 / 5 and 10 / 5.
    assert set(found) == {"mine", "other"}
    mine = found["mine"]
    assert mine.table == ("all_reduce", "eager", "out", "bfloat16")
    assert (mine.sizes, mine.lowest) == (2, 1024)
    assert mine.mean == pytest.approx(math.sqrt(1.6 * 2.0))
    assert mine.low == pytest.approx(1.6)
    assert (found["other"].sizes, found["other"].mean) == (1, pytest.approx(8.0))


def test_tables_are_summarised_separately() -> None:
    places = [dataclasses.replace(row().case, place=place, mode=mode) for place in ("out", "in") for mode in MODES]
    rows = [each for case in places for each in with_ratios([row(case=case), row("mine", 5.0, case=case)])]
    assert len({each.table for each in summaries(rows)}) == len(summaries(rows)) == 4


def test_a_time_below_zero_is_recorded_as_a_small_one() -> None:
    # Copies are timed separately, so subtracting them can make the time of a very short call negative.
    rows = with_ratios([row(), row("mine", times_us=(-0.5, *[0.5] * 3, *[-0.5] * 3))])
    assert json.dumps(document(rows))


@st.composite
def rows(draw: Any) -> Row:
    micros = st.integers(1, 10**10).map(lambda steps: round(steps * STEP_US, 4))
    op = draw(st.sampled_from(OPS))
    shape = (draw(st.integers(1, 1 << 20)), *((64,) if op != OPS[0] else ()))
    case = BenchCase(op, draw(st.sampled_from(MODES)), draw(st.sampled_from(("out", "in"))), "", "cuda", shape)
    case = dataclasses.replace(case, dtype=draw(st.sampled_from([name for name in DTYPES if "float" in name])))
    made = Row(
        TERMINAL,
        "terminal",
        case,
        draw(st.integers(1, 16)),
        draw(st.integers(1, 200)),
        draw(st.integers(1, 200)),
        draw(micros),
        draw(micros),
        tuple(draw(st.lists(micros, min_size=7, max_size=15))),
        draw(st.none() | st.integers(0, 1 << 40)),
    )
    (compared,) = with_ratios([made])
    return draw(st.sampled_from([made, compared]))


@given(rows())
def test_a_row_comes_back_from_json(found: Row) -> None:
    data = json.loads(json.dumps(found.to_json()))
    assert Row.from_json(data, "cuda", found.world_size) == found
    assert data["count"] == found.case.count
    assert data["nbytes"] == found.case.nbytes
    assert data["time_us"] == found.time.median
    assert (data["p10_us"], data["p90_us"]) == (found.time.p10, found.time.p90)
    assert (data["algbw"], data["busbw"]) == (found.algbw, found.busbw)


@given(st.lists(st.floats(1e-3, 1e9), min_size=7, max_size=15))
def test_times_are_rounded_only_once(times: list[float]) -> None:
    data = row(times_us=tuple(times)).to_json()
    again = Row.from_json(data, "cpu", 4)
    assert again.to_json()["times_us"] == data["times_us"]
    assert all(abs(one - other) <= STEP_US for one, other in zip(again.times_us, times, strict=True))


def test_two_runs_are_compared_row_by_row() -> None:
    slower = [dataclasses.replace(each, times_us=(4.0,) * 7) for each in (row("terminal"), row("b"))]
    faster = [dataclasses.replace(each, times_us=(2.0,) * 7) for each in (row("terminal"), row("c"))]
    text = "\n".join(compare(slower, faster))
    name = row("terminal").name
    assert f"# {name}: 2.000 times as fast as before (geometric mean of 1 cases)" in text
    assert "2.000*" in text
    assert "# only in the old run: 1 rows, of b" in text
    assert "# only in the new run: 1 rows, of c" in text
    noisy = [dataclasses.replace(each, times_us=(1.0, *(3.0,) * 4, 5.0, 5.0)) for each in slower]
    assert "*" not in "\n".join(compare(slower, noisy))
