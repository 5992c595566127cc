"""One rank's message stays within its limit, whatever is installed, and only what is too large gives way."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from comm_core._control.stage import MESSAGE_NBYTES
from comm_core._plan.decide import Evidence, encode_answer
from comm_core._plan.fit import fit_answers, fit_evidence, fit_reasons
from comm_core._schema import json_nbytes
from comm_core.topology import Host, RankInfo
from comm_core.types import MAX_RANGES, Available, Range
from hypothesis import given
from hypothesis import strategies as st

reasons = st.dictionaries(st.text(max_size=20), st.text(max_size=400), max_size=12)


def nbytes_of(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")).encode())


def evidence(plugins: dict[str, str], facts: dict[str, Any], failures: dict[str, str]) -> Evidence:
    return Evidence(RankInfo(0, Host("node", "id"), plugins=plugins, facts=facts), {"x": 1}, failures)


@given(reasons, st.integers(0, 2000))
def test_reasons_share_the_room_and_no_name_is_lost(found: dict[str, str], room: int) -> None:
    limit = room + sum(json_nbytes(name) + 4 for name in found)
    fitted = fit_reasons(found, limit)
    assert fitted.keys() == found.keys()
    assert nbytes_of(fitted) <= limit + 2
    for name, reason in found.items():
        if 3 <= json_nbytes(reason) - 2 <= room // len(found):
            assert fitted[name] == reason


def test_reasons_that_fit_stay_whole() -> None:
    found = {"b": "no compiler", "a": "no driver " * 20}
    assert fit_reasons(found, 1000) == found


@pytest.mark.parametrize("count", [1, 60, 600])
def test_many_failures_shorten_their_reasons_alone(count: int) -> None:
    names = {f"backend{number}": "1.0" for number in range(count)}
    names["sound"] = "1.0"
    facts = {"sound": {"path": "x" * 480}}
    broken = dict.fromkeys(names.keys() - {"sound"}, "\U0001f480 its import raised " * 40)
    found = evidence(names, facts, broken)
    fitted = fit_evidence(found, MESSAGE_NBYTES)
    assert nbytes_of(fitted.to_json()) <= MESSAGE_NBYTES
    assert fitted.failures.keys() == broken.keys()
    assert fitted.info.facts == facts
    assert all(reason.startswith("\U0001f480 its ") for reason in fitted.failures.values())
    assert dataclasses.replace(fitted, failures=found.failures) == found
    assert (fitted == found) == (count == 1)


def test_facts_that_dont_fit_cost_their_own_backends() -> None:
    names = {f"backend{number}": "1.0" for number in range(200)}
    facts = {name: {"path": "x" * (480 if number else 20)} for number, name in enumerate(names)}
    fitted = fit_evidence(evidence(names, facts, {"broken": "no"}), MESSAGE_NBYTES)
    assert nbytes_of(fitted.to_json()) <= MESSAGE_NBYTES
    assert fitted.info.facts.keys() | fitted.failures.keys() == {*names, "broken"}
    assert not fitted.info.facts.keys() & fitted.failures.keys()
    assert "backend0" in fitted.info.facts
    assert len(fitted.info.facts) > 50
    assert fitted.failures["broken"] == "no"


def test_names_alone_that_dont_fit_are_an_error_in_words() -> None:
    names = {f"backend{number}" * 6: "1.0" for number in range(2000)}
    fitted = fit_evidence(evidence(names, {}, {}), MESSAGE_NBYTES)
    assert nbytes_of(fitted.to_json()) <= MESSAGE_NBYTES
    assert fitted.error is not None
    assert "Uninstall some" in fitted.error


def test_the_largest_answers_give_way() -> None:
    large = encode_answer(
        Available(500, tuple(Range("all_reduce", min_nbytes=10**17 + i, max_nbytes=10**18) for i in range(MAX_RANGES)))
    )
    small = encode_answer(Available(300, (Range("all_reduce"),)))
    answers = {f"large{number:02}": large for number in range(20)} | {f"small{number}": small for number in range(40)}
    fitted = fit_answers(answers, MESSAGE_NBYTES)
    assert nbytes_of(fitted) <= MESSAGE_NBYTES
    assert fitted.keys() == answers.keys()
    assert all(fitted[name] == small for name in answers if name.startswith("small"))
    refused = [answer["reason"] for answer in fitted.values() if "reason" in answer]
    assert 0 < len(refused) < 20
    assert all("its ranges take" in reason for reason in refused)
    assert fit_answers({"a": small}, MESSAGE_NBYTES) == {"a": small}


def test_long_refusals_are_shortened() -> None:
    answers = {f"backend{number}": {"reason": "\x1b no" * 400} for number in range(200)}
    fitted = fit_answers(answers, MESSAGE_NBYTES)
    assert nbytes_of(fitted) <= MESSAGE_NBYTES
    assert fitted.keys() == answers.keys()
