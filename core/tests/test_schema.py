"""What comes from outside is made printable and short, and JSON of another form is refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comm_core._control.deadline import describe
from comm_core._schema import MAX_DEPTH, MalformedError, json_nbytes, load_json, printable, shorten
from comm_core.topology import RankInfo
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        (
            "größer, 速い, \U0001f680, e\u0301, \u0645\u06cc\u200c\u062e\u0648",
            "größer, 速い, \U0001f680, e\u0301, \u0645\u06cc\u200c\u062e\u0648",
        ),
        ("\x1b[31mred\x1b[0m", "?[31mred?[0m"),
        ("\x1b]0;title\x07", "?]0;title?"),
        ("\x9b2J", "?2J"),
        ("one\r\ntwo\tthree\u2028four", "one two three four"),
        ("a\x00b\x7fc\x85d", "a?b?c d"),
        ("\u202egnp.exe", "?gnp.exe"),
        ("half \ud800 a pair", "half ? a pair"),
    ],
)
def test_text_becomes_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_printable_text_is_one_line_that_any_unicode_encoding_takes(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    assert len(shown.splitlines()) <= 1
    shown.encode()


def test_the_description_of_an_exception_is_printable() -> None:
    assert describe(OSError("\x1b[2J\nno \udcff device")) == "OSError: ?[2J no ? device"


@given(st.text(max_size=80), st.integers(3, 200))
def test_a_short_text_stays_and_a_long_one_ends_in_dots(text: str, nbytes: int) -> None:
    short = shorten(text, nbytes)
    assert json_nbytes(short) - 2 <= nbytes
    assert short == text or (short.endswith("...") and text.startswith(short[:-3]))
    assert (short == text) == (json_nbytes(text) - 2 <= nbytes)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(nested(MAX_DEPTH + 2), id="too deep"),
        pytest.param(nested(100_000), id="far too deep"),
        pytest.param('{"a":' * 5000 + "1" + "}" * 5000, id="objects too deep"),
        pytest.param("", id="empty"),
        pytest.param("[1", id="cut off"),
        pytest.param("[1] 2", id="two values"),
        pytest.param("{'a': 1}", id="Python's quotes"),
        pytest.param("[NaN]", id="NaN"),
        pytest.param("[-Infinity]", id="infinite"),
        pytest.param("[1e999]", id="a float out of range"),
        pytest.param("1" * 5000, id="an integer of 5000 digits"),
        pytest.param(b"\xff\xfe\xfd", id="no text"),
        pytest.param(b"\x00" * 20, id="zeros"),
    ],
)
def test_what_isnt_json_is_refused_by_one_kind_of_error(data: str | bytes) -> None:
    with pytest.raises(MalformedError, match="it "):
        load_json(data)


@pytest.mark.parametrize("text", [nested(MAX_DEPTH), '{"a": [1, 2.5, null, true, "\\ud800"]}', "0", '"a"'])
def test_other_json_is_read(text: str) -> None:
    assert load_json(text) == json.loads(text)
    with pytest.raises(MalformedError, match=f"it has {len(text)} bytes; the limit is {len(text) - 1}"):
        load_json(text, len(text) - 1)


def test_control_characters_from_another_rank_are_replaced() -> None:
    info: dict[str, Any] = {
        "global_rank": 0,
        "host": {"name": "node\x1b[2J", "id": "id"},
        "plugins": {"fast\r": "1.0\x07"},
        "unknown": {"nvml": "line\nline"},
        "facts": {"fast": {"path": "kept\tas it is"}},
    }
    found = RankInfo.from_json(info)
    assert found.host.name == "node?[2J"
    assert found.plugins == {"fast ": "1.0?"}
    assert found.unknown == {"nvml": "line line"}
    assert found.facts == {"fast": {"path": "kept\tas it is"}}
