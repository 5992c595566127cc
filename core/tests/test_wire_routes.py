"""The routes of groups that ask for a quantised wire."""

from __future__ import annotations

import pytest
from comm_core._plan.cases import admission_cases
from comm_core._plan.decide import Slate, encode_answer, initial_slate
from comm_core._plan.explain import explain_message
from comm_core._plan.routes import Offer
from comm_core.tuning import Tuning, parse_rules
from comm_core.types import TERMINAL, Available, Range, Rule

PLAIN, FUSED = "all_reduce", "all_reduce_add_rms_norm"
EXACT, WIRE = Range(PLAIN, max_nbytes=4096), Range(PLAIN, min_nbytes=1024, max_nbytes=8192, wire="fp8")
OFFERS = (Offer("fast", 900, (Range(PLAIN, max_nbytes=64),)), Offer("a", 300, (EXACT, WIRE)))


def rules(slate: Slate) -> tuple[Rule, ...]:
    return slate.decision(("cuda",)).route(PLAIN, "graph", "cuda", "bfloat16").rules


def test_the_wire_comes_first_in_groups_that_ask_for_it_and_nowhere_else() -> None:
    exact = (Rule("fast", max_nbytes=64), Rule("a", max_nbytes=4096), Rule(TERMINAL))
    assert rules(Slate(OFFERS)) == exact
    assert rules(Slate(OFFERS, wire="fp8")) == (Rule("a", 1024, 8192, wire="fp8"), *exact)


def test_a_backend_of_wires_alone_says_why_it_serves_nothing() -> None:
    offers = (Offer("a", 300, (WIRE,)),)
    found = Slate(offers).decision(("cuda",)).candidate("a")
    assert found is not None
    assert (found.verdict, found.reason) == (
        "standby",
        "it has only ranges with a wire, for which the group doesn't ask",
    )


def test_a_message_is_explained_with_its_wire_also_where_core_composes() -> None:
    decision = Slate(OFFERS, wire="fp8").decision(("cuda",))
    for op, text in (
        (PLAIN, ": a over an fp8 wire"),
        (FUSED, ": core's norm after an all_reduce by a over an fp8 wire"),
    ):
        route = decision.route(op, "eager", "cuda", "bfloat16")
        assert explain_message(decision, route, 2048).endswith(text)
        assert "wire" not in explain_message(decision, route, 512)


def test_the_json_of_a_decision_names_the_wire() -> None:
    data = Slate(OFFERS, wire="fp8").decision(("cuda",)).to_json()
    assert data["wire"] == "fp8"
    route = next(route for route in data["routes"] if route["op"] == PLAIN)
    assert [rule["wire"] for rule in route["rules"]] == ["fp8", "", "", ""]


def test_tuning_rules_exclude_the_wire_but_put_nothing_before_it() -> None:
    (first, *_) = rules(Slate(OFFERS, tuning=Tuning(parse_rules("fast:999"), "test"), wire="fp8"))
    assert first.wire == "fp8"
    left = rules(Slate(OFFERS, tuning=Tuning(parse_rules("a:0"), "test"), wire="fp8"))
    assert [rule.backend for rule in left] == ["fast", TERMINAL]


def test_the_admission_test_knows_which_sums_are_quantised() -> None:
    cases = admission_cases(Slate(OFFERS, wire="fp8").routes(("cuda",)), "a")
    assert {case.wire for case in cases} == {"", "fp8"}
    for case in cases:
        itemsize = {"float32": 4, "bfloat16": 2}.get(case.cell[3])
        if itemsize is not None:
            assert (case.wire == "fp8") is (1024 <= case.shape[0] * itemsize <= 8192)


def test_ranges_with_and_without_the_wire_have_no_message_in_common() -> None:
    assert EXACT.intersect(WIRE) is None
    assert WIRE.intersect(WIRE) == WIRE
    answers = [{"a": encode_answer(Available(300, ranges))} for ranges in ((EXACT, WIRE), (EXACT,))]
    assert initial_slate({"a": "1"}, answers).offer("a").ranges == (EXACT,)
    assert initial_slate({"a": "1"}, answers[:1] * 2).offer("a").ranges == (EXACT, WIRE)


@pytest.mark.parametrize(
    ("op", "wire", "text"),
    [
        (PLAIN, "fp4", "wire='fp4': all_reduce takes '' or 'fp8'"),
        ("all_reduce_add_rms_norm", "fp8", "wire='fp8': all_reduce_add_rms_norm takes ''"),
    ],
)
def test_only_plain_sums_have_a_wire(op: str, wire: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        Range(op, wire=wire)
