"""The table, the option and the layout of the buffers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from comm_core.tuning import VariantChoice
from comm_plugin_customar_v1 import layout, policy

FLAGS_NBYTES, TEST_NBYTES = 131328, 65536


@pytest.mark.parametrize("count", policy.WORLD_SIZES)
def test_every_table_can_be_launched(count: int) -> None:
    rows = policy.rows_for(count)
    assert all(one.up_to_nbytes < other.up_to_nbytes for one, other in pairwise(rows))
    assert rows[-1].up_to_nbytes == policy.MAX_NBYTES
    for row in rows:
        assert row.algorithm in policy.ALGORITHMS
        assert row.vecs in (1, 2, 4)
        assert row.vecs <= policy.max_vecs(count)
        assert row.threads % 32 == 0
        assert 32 <= row.threads <= policy.MAX_THREADS
        assert 1 <= row.blocks <= policy.MAX_BLOCKS


def test_two_ranks_take_one_stage_and_more_ranks_two_for_large_messages() -> None:
    assert {row.algorithm for row in policy.rows_for(2)} == {"one_stage"}
    for count in policy.WORLD_SIZES[1:]:
        assert [policy.rows_for(count)[index].algorithm for index in (0, -1)] == ["one_stage", "two_stage"]


@pytest.mark.parametrize("budget", [1 << 30, 18 << 20, 17 << 20, 4 << 20, 2 << 20])
def test_the_buffer_holds_its_regions_and_no_more_than_the_budget(budget: int) -> None:
    plan = layout.plan(budget, FLAGS_NBYTES, TEST_NBYTES)
    regions = [
        (0, FLAGS_NBYTES),
        (plan.test_at, TEST_NBYTES),
        (plan.staging_at, 2 * plan.staging_nbytes),
        (plan.nbytes, 0),
    ]
    assert all(begin + nbytes <= following for (begin, nbytes), (following, _) in pairwise(regions))
    assert all(begin % 4096 == 0 for begin, _ in regions)
    assert plan.staging_nbytes % 16 == 0
    assert plan.nbytes % (2 << 20) == 0
    assert plan.nbytes <= budget
    assert plan.numbers() == [plan.test_at, plan.staging_at, plan.staging_nbytes]


def test_the_memory_that_the_readme_names() -> None:
    plan = layout.plan(1 << 30, FLAGS_NBYTES, TEST_NBYTES)
    assert plan.nbytes == 18 << 20
    assert plan.staging_nbytes == policy.MAX_NBYTES


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(MemoryError, match="the budget is 1000000"):
        layout.plan(1_000_000, FLAGS_NBYTES, TEST_NBYTES)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("one_stage", policy.Row(8 << 20, "one_stage")),
        ("two_stage:vecs=4,threads=128,blocks=99", policy.Row(8 << 20, "two_stage", 4, 128, 99)),
    ],
)
def test_the_option(text: str, row: policy.Row) -> None:
    assert policy.parse({policy.OPTION: text}) == row
    assert policy.parse({}) is None
    assert policy.parse({policy.OPTION: " "}) is None


@pytest.mark.parametrize(
    "text",
    [
        *("nccl", "one_stage:vecs=3", "one_stage:threads=33", "one_stage:threads=1024", "one_stage:x=1"),
        *("one_stage:vecs", "one_stage:vecs=-1", "one_stage:blocks=0", "one_stage:blocks=513"),
    ],
)
def test_an_option_that_cant_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=policy.OPTION):
        policy.parse({policy.OPTION: text})


def test_rows_are_flattened_in_the_native_codes_order() -> None:
    assert policy.flat([policy.Row(16, "two_stage", 2, 64, 3), policy.Row(32, "one_stage")]) == [
        *(16, 1, 2, 64, 3),
        *(32, 0, 1, 256, 264),
    ]


@pytest.mark.parametrize("count", policy.WORLD_SIZES)
def test_every_variant_can_be_launched_and_the_one_in_use_comes_first(count: int) -> None:
    rows = policy.rows_for(count)
    for nbytes in [(1 << power) + extra for power in range(1, 23) for extra in (0, 2)]:
        texts = policy.variants_of(rows, count, nbytes)
        found = [policy.parse_row(text) for text in texts]
        present = next(row for row in rows if nbytes <= row.up_to_nbytes)
        assert found[0].numbers()[1:] == present.numbers()[1:]
        assert 1 < len(set(texts)) == len(texts) < 40
        assert all(row.vecs <= policy.max_vecs(count) for row in found)
    assert policy.variants_of(rows, count, policy.MAX_NBYTES + 1) == []


def test_choices_take_the_place_of_rows() -> None:
    rows = policy.rows_for(8)
    text = "two_stage:vecs=1,threads=128,blocks=48"
    first, chosen, *rest = policy.with_choices(rows, 8, [VariantChoice("all_reduce", text, 4096, 65536)])
    assert first == policy.Row(4095, "one_stage", threads=512, blocks=32)
    assert chosen == policy.Row(65536, "two_stage", 1, 128, 48)
    assert tuple(rest) == rows
    assert policy.variants_of([first, chosen, *rest], 8, 8192)[0] == text


@pytest.mark.parametrize(
    ("op", "text", "words"),
    [
        ("all_reduce", "ring", "isn't one of one_stage, two_stage"),
        ("all_reduce", "one_stage:vecs=4", "with 8 ranks there is no such kernel"),
        ("all_reduce_add_rms_norm", "one_stage", "with 8 ranks there is no such kernel"),
    ],
)
def test_a_text_that_is_no_variant_is_refused(op: str, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        policy.with_choices(policy.rows_for(8), 8, [VariantChoice(op, text)])
