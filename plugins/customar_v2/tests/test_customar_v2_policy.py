"""The table, the option and the layout of the buffers: pure, so they are looked at whole."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from comm_plugin_customar_v2 import layout, norm_policy, policy

KINDS = [(major, count) for major in (8, 9, 10) for count in range(2, 9)]


@pytest.mark.parametrize(("major", "count"), KINDS)
def test_every_table_can_be_launched(major: int, count: int) -> None:
    rows = policy.rows_for(major, count)
    assert all(one.up_to_nbytes < other.up_to_nbytes for one, other in pairwise(rows))
    for row in rows:
        assert row.algorithm in policy.ALGORITHMS
        assert row.vecs in ((1, 2, 4) if count == 2 else (1,))
        assert row.threads % 32 == 0
        # `max_threads` in csrc/params.cuh.
        most = (512 if row.vecs >= 4 else 1024) if count == 2 else 256 if (count - 1) * row.vecs >= 5 else 512
        assert 32 <= row.threads <= most
        assert 1 <= row.blocks <= 512
        assert row.up_to_nbytes % 16 == 0


@pytest.mark.parametrize(("major", "count"), KINDS)
def test_every_fused_table_can_be_launched(major: int, count: int) -> None:
    rows = norm_policy.rows_for(major, count)
    assert all(one.up_to_nbytes < other.up_to_nbytes for one, other in pairwise(rows))
    # `policy.ranges` gives both operations one limit.
    assert rows[-1].up_to_nbytes == policy.rows_for(major, count)[-1].up_to_nbytes
    for row in rows:
        assert row.algorithm in norm_policy.ALGORITHMS
        # `min_norm_vecs` and `max_norm_vecs` in csrc/norm.cuh.
        assert row.vecs in ((2,) if count > 2 else (1, 2, 4) if row.algorithm == "oneshot_push_norm" else (1, 2))
        assert row.cluster in ((1, 2, 4, 8) if major >= 9 else (1,))
        assert row.cluster <= row.blocks
        assert row.up_to_nbytes % 16 == 0


@pytest.mark.parametrize(("major", "count"), KINDS)
def test_the_tables_of_the_wire_can_be_launched_and_have_their_slots(major: int, count: int) -> None:
    rows, exact = policy.wire_rows_for(major, count), policy.rows_for(major, count)
    assert all(one.up_to_nbytes < other.up_to_nbytes for one, other in pairwise(rows))
    assert policy.WIRE_FROM_NBYTES < rows[-1].up_to_nbytes == exact[-1].up_to_nbytes
    plan = layout.plan(count, [*exact, *rows], 1 << 30)
    for row in rows:
        assert row.algorithm == ("oneshot_push_fp8" if count == 2 else "twoshot_push_fp8")
        # `capacity` in csrc/session.cuh.
        slot, parts = (plan.cells_nbytes, 1) if count == 2 else (plan.cells_nbytes // 2, count)
        assert (slot - 5 * 4096) // 528 * 512 * 2 * parts >= row.up_to_nbytes
        assert row.vecs == 1
        assert row.pipeline_depth == 0 or count > 2
        # `max_threads` in csrc/params.cuh, for twice the vectors.
        assert row.threads <= (1024 if count == 2 else 256 if count > 3 else 512)
        assert row.threads % 32 == 0


@pytest.mark.parametrize(("major", "count"), KINDS)
def test_a_forced_algorithm_leaves_the_fused_calls_their_slots(major: int, count: int) -> None:
    rows = policy.rows_for(major, count, policy.parse_row("twoshot_push"))
    fused = norm_policy.rows_for(major, count)
    plan = layout.plan(count, [*rows, *norm_policy.slot_rows(fused)], 1 << 30)
    # A row of a model's in each half of a slot.
    assert plan.cells_nbytes >= 2 * 16384 * 4


@pytest.mark.parametrize(("major", "count"), KINDS)
def test_the_buffers_hold_the_table_and_no_more_than_the_budget(major: int, count: int) -> None:
    rows = policy.rows_for(major, count)
    plan = layout.plan(count, rows, 1 << 30)
    regions = [
        (0, 8),
        (plan.tails_at, 24 * 2 * (count - 1) * 16),
        (plan.cells_at, 2 * (count - 1) * plan.cells_nbytes),
        (plan.nbytes, 0),
    ]
    assert all(begin + nbytes <= following for (begin, nbytes), (following, _) in pairwise(regions))
    assert all(begin % 4096 == 0 for begin, _ in regions)
    for row in rows:
        if row.algorithm == "twoshot_push":
            assert (plan.cells_nbytes // 2 - 5 * 4096 - 16) // 16 * 16 * count >= row.up_to_nbytes
        else:
            assert plan.cells_nbytes - 5 * 4096 >= min(row.up_to_nbytes, layout.SLOT_NBYTES)
    small = layout.plan(count, rows, 2 << 20)
    assert small.nbytes <= 2 << 20
    with pytest.raises(MemoryError, match="the budget is 1000"):
        layout.plan(count, rows, 1000)


def test_the_memory_that_the_readme_names() -> None:
    rows = [*policy.rows_for(9, 2), *norm_policy.slot_rows(norm_policy.rows_for(9, 2))]
    plan = layout.plan(2, rows, 1 << 30)
    assert 2 * (plan.cells_nbytes - 10 * 4096) == 64 << 20
    assert plan.nbytes == 66 << 20
    assert layout.plan(2, [*rows, *policy.wire_rows_for(9, 2)], 1 << 30).nbytes == 68 << 20


def test_every_algorithm_has_room_once_it_is_forced() -> None:
    for name in policy.ALGORITHMS:
        rows = policy.rows_for(9, 4, policy.parse_row(name))
        plan = layout.plan(4, rows, 1 << 30)
        assert plan.cells_nbytes >= 64 << 10


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("oneshot_push", policy.Row(0, "oneshot_push")),
        ("twoshot_push:vecs=4,threads=128,blocks=99,pipeline_depth=2", policy.Row(0, "twoshot_push", 4, 128, 99, 2)),
    ],
)
def test_the_option(text: str, row: policy.Row) -> None:
    assert policy.parse({policy.OPTION: text}) == row
    assert policy.parse({}) is None
    assert policy.parse({policy.OPTION: " "}) is None


@pytest.mark.parametrize(
    "text", ["nccl", "oneshot_push:vecs=3", "oneshot_push:threads=33", "oneshot_push:x=1", "a:vecs=-1"]
)
def test_an_option_that_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match=policy.OPTION):
        policy.parse({policy.OPTION: text})


def test_the_rows_numbers_are_in_the_native_codes_order() -> None:
    row = policy.Row(16, "twoshot_push", 2, 64, 3, 4)
    assert policy.flat([row, dataclasses.replace(row, pipeline_depth=5)]) == [16, 2, 2, 64, 3, 4, 16, 2, 2, 64, 3, 5]


def test_the_fused_rows_numbers_are_in_the_native_codes_order() -> None:
    row = norm_policy.NormRow(16, "twoshot_push_norm", 2, 4, 64, 3)
    assert norm_policy.flat([row, norm_policy.NormRow(32, "separate")]) == [16, 1, 2, 4, 64, 3, 32, 2, 1, 1, 1056, 0]
