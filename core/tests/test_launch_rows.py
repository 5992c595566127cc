"""Rows of a backend's table: their texts, their numbers, and the option that forces one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
from comm_core.launch_rows import MAX_NUMBER, LaunchRow, flat, read_option
from hypothesis import given
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Row(LaunchRow):
    codes: ClassVar = {"ring": 0, "tree": 4}
    threads: int = 256
    blocks: int = 64


NUMBERS = st.integers(0, MAX_NUMBER)
ROWS = st.builds(Row, NUMBERS, st.sampled_from(["ring", "tree"]), NUMBERS, NUMBERS)


@given(ROWS)
def test_a_row_comes_back_from_its_text_and_its_numbers(row: Row) -> None:
    assert dataclasses.replace(Row.parse(str(row)), up_to_nbytes=row.up_to_nbytes) == row
    assert Row.from_numbers(row.numbers()) == row


def test_the_forms_of_a_row() -> None:
    row = Row.parse("tree:threads=128")
    assert row == Row(0, "tree", 128, 64)
    assert str(row) == "tree:threads=128,blocks=64"
    assert row.numbers() == (0, 4, 128, 64)
    assert flat([row, Row(7, "ring")]) == [0, 4, 128, 64, 7, 0, 256, 64]
    assert Row.parse("ring") == Row.parse("ring:") == Row(0, "ring")
    assert Row.parse(f"ring:blocks={MAX_NUMBER + 1}").blocks == MAX_NUMBER


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("star", "'star': 'star' isn't one of ring, tree"),
        ("tree:depth=2", "'tree:depth=2': 'depth=2' isn't a number for one of threads=, blocks="),
        ("tree:up_to_nbytes=2", "'tree:up_to_nbytes=2': 'up_to_nbytes=2' isn't a number for one of threads=, blocks="),
        ("tree:blocks=-1", "'tree:blocks=-1': 'blocks=-1' isn't a number for one of threads=, blocks="),
        ("tree:blocks", "'tree:blocks': 'blocks' isn't a number for one of threads=, blocks="),
    ],
)
def test_a_text_that_is_no_row(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="isn't") as caught:
        Row.parse(text)
    assert str(caught.value) == reason
    with pytest.raises(ValueError, match="isn't") as caught:
        read_option("FORCED", {"FORCED": text}, Row.parse)
    assert str(caught.value) == f"FORCED={reason}"


def test_a_text_may_name_only_some_algorithms() -> None:
    assert Row.parse("ring", ["ring"]).algorithm == "ring"
    with pytest.raises(ValueError, match="'tree' isn't one of ring"):
        Row.parse("tree", ["ring"])


@pytest.mark.parametrize("environ", [{}, {"FORCED": ""}, {"FORCED": " "}])
def test_an_option_that_is_unset_or_empty_forces_nothing(environ: dict[str, str]) -> None:
    assert read_option("FORCED", environ, Row.parse) is None


def test_an_option_forces_a_row() -> None:
    assert read_option("FORCED", {"FORCED": " tree:blocks=3 "}, Row.parse) == Row(0, "tree", blocks=3)
