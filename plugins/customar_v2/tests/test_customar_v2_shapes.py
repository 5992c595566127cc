"""The launch shapes that are offered to the tuner, and tables with its choices: pure."""

from __future__ import annotations

import itertools

import pytest
from comm_core.tuning import VariantChoice
from comm_core.types import OPS
from comm_plugin_customar_v2 import layout, norm_policy, policy, shapes

KINDS = [(major, count) for major in (8, 9, 10) for count in range(2, 9)]
SIZES = [(1 << power) + extra for power in range(4, 27) for extra in (0, 12)]
SUM, FUSED, QUANT = OPS


def fitting(tables: shapes.Tables) -> list[int]:
    return [nbytes for nbytes in SIZES if nbytes <= tables.rows[-1].up_to_nbytes]


@pytest.mark.parametrize(("major", "count"), KINDS)
def test_every_plain_shape_can_be_launched_and_the_one_in_use_comes_first(major: int, count: int) -> None:
    tables = shapes.tables_for(major, count)
    plan = layout.plan(count, [*tables.rows, *norm_policy.slot_rows(tables.norm_rows)], 512 << 20)
    for nbytes in fitting(tables):
        texts = shapes.variants_of(tables, SUM, nbytes, 0)
        rows = [policy.parse_row(text) for text in texts]
        present = next(row for row in tables.rows if nbytes <= row.up_to_nbytes)
        assert rows[0].numbers()[1:] == present.numbers()[1:]
        assert len(set(texts)) == len(texts) < 50
        for row in rows:
            assert row.vecs in ((1, 2, 4) if count == 2 else (1,))
            # `max_threads` in csrc/params.cuh.
            most = (512 if row.vecs >= 4 else 1024) if count == 2 else 256 if (count - 1) * row.vecs >= 5 else 512
            assert row.threads <= most
            # A slot holds at least a part of a message; a large one takes several launches.
            cells = plan.cells_nbytes // (2 if row.algorithm == "twoshot_push" else 1)
            assert cells - 5 * 4096 - 16 >= 4096
    # There is a choice at every size, and the first few shapes are of several algorithms where several serve.
    assert all(len(shapes.variants_of(tables, SUM, nbytes, 0)) > 3 for nbytes in fitting(tables))
    few = shapes.variants_of(tables, SUM, 128 << 10, 0)[:4]
    assert {text.partition(":")[0] for text in few} == {"oneshot_push", "twoshot_push"}
    assert shapes.variants_of(tables, SUM, tables.rows[-1].up_to_nbytes + 1, 0) == []


@pytest.mark.parametrize(("major", "count"), KINDS)
@pytest.mark.parametrize("row_nbytes", [256, 5760, 8192, 14336, 32768])
def test_every_fused_shape_can_be_launched_and_the_one_in_use_comes_first(
    major: int, count: int, row_nbytes: int
) -> None:
    tables = shapes.tables_for(major, count)
    offered = 0
    for num_tokens in (1, 2, 3, 7, 16, 129, 1000):
        nbytes = num_tokens * row_nbytes
        if nbytes > tables.norm_rows[-1].up_to_nbytes:
            continue
        texts = shapes.variants_of(tables, FUSED, nbytes, num_tokens)
        rows = [norm_policy.parse_row(text) for text in texts]
        present = next(row for row in tables.norm_rows if nbytes <= row.up_to_nbytes)
        assert rows[0].numbers()[1:] == present.numbers()[1:]
        assert len(set(texts)) == len(texts) < 50
        for row in rows[1:]:
            # `min_norm_vecs` and `max_norm_vecs` in csrc/norm.cuh.
            assert row.vecs in ((2,) if count > 2 else (1, 2, 4) if row.algorithm == "oneshot_push_norm" else (1, 2))
            assert row.cluster in ((1, 2, 4, 8) if major >= 9 else (1,))
        offered += len(texts)
    assert offered > 7
    assert shapes.variants_of(tables, QUANT, row_nbytes, 1) == []


def test_choices_take_the_place_of_rows() -> None:
    tables = shapes.tables_for(9, 8)
    text = "twoshot_push:vecs=1,threads=128,blocks=264,pipeline_depth=1"
    norm_text = "oneshot_push_norm:vecs=2,cluster=8,blocks=1056,pipeline_depth=0"
    choices = [VariantChoice(SUM, text, 4096, 65536), VariantChoice(FUSED, norm_text)]
    tuned = shapes.with_choices(tables, choices)
    first, chosen, *rest = tuned.rows
    assert first == policy.Row(4095, "oneshot_push", threads=128, blocks=128)
    assert chosen == policy.Row(65536, "twoshot_push", threads=128, blocks=264, pipeline_depth=1)
    assert tuple(rest) == tables.rows
    assert {row.numbers()[1:] for row in tuned.norm_rows} == {norm_policy.parse_row(norm_text).numbers()[1:]}
    assert tuned.norm_rows[-1].up_to_nbytes == tables.norm_rows[-1].up_to_nbytes
    # What is chosen is in use, and so comes first.
    assert shapes.variants_of(tuned, SUM, 8192, 0)[0] == text
    assert shapes.variants_of(tuned, FUSED, 8192, 1)[0] == norm_text
    assert shapes.with_choices(tuned, []) == tuned


def test_a_forced_algorithm_stays() -> None:
    tables = shapes.tables_for(9, 2, policy.parse_row("twoshot_push"))
    assert len(shapes.variants_of(tables, SUM, 8192, 0)) == 1
    assert len(shapes.variants_of(tables, FUSED, 8192, 1)) > 1
    tuned = shapes.with_choices(tables, [VariantChoice(SUM, "oneshot_push")])
    assert tuned.rows == tables.rows


@pytest.mark.parametrize(
    ("op", "text", "words"),
    [
        (SUM, "ring", "'ring' isn't one of oneshot_push, "),
        (SUM, "oneshot_push:threads=33", "a multiple of 32"),
        (SUM, "oneshot_push_norm", "isn't one of"),
        (FUSED, "oneshot_push", "isn't one of oneshot_push_norm, twoshot_push_norm"),
        # Its results have other bits.
        (FUSED, "separate", "isn't one of"),
        (FUSED, "oneshot_push_norm:cluster=3", "cluster 1, 2, 4 or 8"),
        (FUSED, "twoshot_push_norm:cluster=8,blocks=4", "at least cluster"),
        (FUSED, "twoshot_push_norm:threads=64", "'threads=64' isn't a number for one of vecs="),
        (QUANT, "oneshot_push_norm", "has no launch shapes of its own"),
    ],
)
def test_a_text_that_is_no_shape_is_refused(op: str, text: str, words: str) -> None:
    for major, count in itertools.product((8, 9), (2, 8)):
        with pytest.raises(ValueError, match=words):
            shapes.with_choices(shapes.tables_for(major, count), [VariantChoice(op, text)])
