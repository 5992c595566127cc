from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from comm_core._plan.checks import check_policies, describe_differences
from comm_core._plan.decide import (
    Evidence,
    Slate,
    encode_answer,
    initial_slate,
    screen_candidates,
    with_explicit_ranges,
)
from comm_core._plan.routes import Offer, cells
from comm_core._schema import printable
from comm_core.errors import NegotiationError
from comm_core.topology import Device, Host, Link, RankInfo
from comm_core.types import DTYPES, OPS, TERMINAL, Available, Candidate, Range, Unavailable
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import DEVICE_TYPES, a_message, a_range, backwards, generators, offers, serves, takes

patient = settings(deadline=None, max_examples=100)

HOST = Host("node", "an id")
texts = st.text(max_size=8).map(printable)
values = st.none() | st.booleans() | st.integers() | texts | st.lists(texts, max_size=2)
evidences = st.builds(
    Evidence,
    st.builds(
        RankInfo,
        st.integers(0, 4095),
        st.builds(Host, texts, texts),
        st.none() | st.builds(Device, texts, texts, links=st.dictionaries(texts, st.builds(Link, st.integers(0, 18)))),
        plugins=st.dictionaries(texts, texts, max_size=3),
    ),
    st.dictionaries(texts, values, max_size=4),
    st.dictionaries(texts, texts, max_size=2),
    st.none() | texts,
)


def evidence(
    plugins: Mapping[str, str] | None = None,
    failures: Mapping[str, str] | None = None,
    policy: Mapping[str, Any] | None = None,
    error: str | None = None,
) -> Evidence:
    return Evidence(RankInfo(0, HOST, plugins=plugins or {}), policy or {}, failures or {}, error)


def by_name(dropped: Sequence[Candidate]) -> dict[str, tuple[str, str, int | None]]:
    return {item.name: (item.verdict, item.reason, item.rank) for item in dropped}


@patient
@given(evidences)
def test_json_brings_back_the_same_evidence(item: Evidence) -> None:
    assert Evidence.from_json(json.loads(json.dumps(item.to_json()))) == item


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (["580.65", "580.65", "580.65", "driver 550.54"], "{3: 'driver 550.54', others: '580.65'}"),
        (["a", "b"], "{1: 'b', others: 'a'}"),
        ([300.0, 300.0, 5], "{2: 5, others: 300.0}"),
        ([["nccl"], None, None], "{0: ['nccl'], others: None}"),
        (["same", "same"], "{others: 'same'}"),
        ([0, *range(1, 12), 0], "{1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, …, others: 0}"),
    ],
)
def test_differences_say_which_ranks_have_what(found: list[Any], text: str) -> None:
    assert describe_differences(found) == text


def test_equal_policies_pass() -> None:
    check_policies([evidence(policy={"COMM_CORE_DISABLE": ["a"]}) for _ in range(3)], str)
    check_policies([evidence(policy={"COMM_CORE_BACKENDS": None}), evidence()], str)


def test_a_policy_that_differs_is_named_with_the_ranks_that_have_it() -> None:
    asked = [evidence(policy={"same": 1, "COMM_CORE_DISABLE": ["shm"] if rank == 2 else []}) for rank in range(4)]
    with pytest.raises(NegotiationError, match="COMM_CORE_DISABLE differs") as raised:
        check_policies(asked, str)
    assert "{2: ['shm'], others: []}" in str(raised.value)
    assert "same differs" not in str(raised.value)


def test_a_setting_that_one_rank_alone_has_differs_from_its_absence() -> None:
    with pytest.raises(NegotiationError, match=r"\{1: 7, others: None\}"):
        check_policies([evidence(), evidence(policy={"x": 7}), evidence()], str)


def test_one_ranks_error_is_raised_on_all_and_each_text_appears_once() -> None:
    found = [evidence(error="COMM_CORE_X='y' can't be read") for _ in range(5)]
    found += [evidence(), evidence(error="no device")]
    with pytest.raises(NegotiationError) as raised:
        check_policies(found, lambda rank: f"rank {rank}")
    text = str(raised.value)
    assert "rank 0 and 4 more: COMM_CORE_X='y' can't be read; rank 6: no device" in text
    assert text.count("can't be read") == 1


def test_who_is_there_everywhere_at_one_version_is_asked() -> None:
    asked, dropped = screen_candidates([evidence({"b": "2", "a": "1"}), evidence({"a": "1", "b": "2"})], None, (), "")
    assert asked == {"a": "1", "b": "2"}
    assert list(asked) == ["a", "b"]
    assert dropped == ()


def test_the_others_are_dropped_with_the_rank_and_its_reason() -> None:
    found = [
        evidence({"fine": "1", "old": "1", "gone": "1", "broken": "1"}),
        evidence({"fine": "1", "old": "1", "gone": "1", "broken": "1"}, {"broken": "its import raised"}),
        evidence({"fine": "1", "old": "0.9", "broken": "1"}, {"nameless": "two register it"}),
    ]
    asked, dropped = screen_candidates(found, None, (), "")
    assert list(asked) == ["fine"]
    assert by_name(dropped) == {
        "broken": ("unavailable", "its import raised", 1),
        "gone": ("unavailable", "not installed here, but installed on other ranks", 2),
        "nameless": ("unavailable", "two register it", 2),
        "old": ("unavailable", "its version differs between ranks: {2: '0.9', others: '1'}", None),
    }


def test_who_is_blocked_is_not_asked_and_the_reason_says_by_what() -> None:
    found = [evidence({"a": "1", "b": "1", "c": "1"})] * 2
    asked, dropped = screen_candidates(found, ("a", "b", TERMINAL), ("b",), "COMM_CORE_BACKENDS")
    assert list(asked) == ["a"]
    assert by_name(dropped) == {
        "b": ("blocked", "COMM_CORE_DISABLE names it", None),
        "c": ("blocked", "COMM_CORE_BACKENDS names other backends", None),
    }


def test_who_must_not_be_imported_is_not_asked_though_it_is_named() -> None:
    found = [evidence({"a": "1", "b": "1", "c": "1"})] * 2
    asked, dropped = screen_candidates(found, ("a", "b"), ("c",), "get_backend(backends=...)", ("a", "c"))
    assert list(asked) == ["a"]
    assert by_name(dropped) == {
        "b": ("blocked", "COMM_CORE_PLUGINS doesn't name it", None),
        "c": ("blocked", "COMM_CORE_DISABLE names it", None),
    }


def test_a_named_backend_that_is_not_installed_is_reported() -> None:
    asked, dropped = screen_candidates([evidence()] * 2, ("ghost", TERMINAL), (), "get_backend(backends=...)")
    assert asked == {}
    assert by_name(dropped) == {"ghost": ("unavailable", "not installed on any rank", None)}


@patient
@given(
    st.lists(
        st.builds(
            evidence,
            st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"), max_size=4),
            st.dictionaries(st.sampled_from("abcde"), st.just("it raised"), max_size=1),
        ),
        min_size=1,
        max_size=4,
    ),
    st.none() | st.lists(st.sampled_from("abcdef"), unique=True).map(tuple),
    st.lists(st.sampled_from("abcdef"), unique=True).map(tuple),
)
def test_every_known_backend_is_asked_or_dropped_in_any_order_of_names(
    found: list[Evidence], wanted: tuple[str, ...] | None, disabled: tuple[str, ...]
) -> None:
    asked, dropped = screen_candidates(found, wanted, disabled, "it")
    known = {name for item in found for name in (*item.info.plugins, *item.failures)} | set(wanted or ())
    assert sorted([*asked, *(item.name for item in dropped)]) == sorted(known)
    for name, version in asked.items():
        assert {item.info.plugins.get(name) for item in found} == {version}
        assert name not in disabled
        assert wanted is None or name in wanted
    turned = [evidence(backwards(item.info.plugins), backwards(item.failures)) for item in found]
    assert screen_candidates(turned, wanted and wanted[::-1], disabled[::-1], "it") == (asked, dropped)


@patient
@given(generators())
def test_an_answer_survives_json(rng: random.Random) -> None:
    priority, made = rng.randint(1, 999), [a_range(rng) for _ in range(rng.randint(1, 4))]
    answer = json.loads(json.dumps(encode_answer(Available(priority, tuple(made)))))
    assert initial_slate({"a": "1"}, [{"a": answer}] * 2).offers == (Offer("a", priority, tuple(made), "1"),)


def test_a_reason_survives_json() -> None:
    assert encode_answer(Unavailable("no link")) == encode_answer("no link") == {"reason": "no link"}


def answers_of(*answers: Available | Unavailable) -> list[dict[str, Any]]:
    return [{"a": encode_answer(answer)} for answer in answers]


def test_one_ranks_refusal_counts_for_all_with_its_reason() -> None:
    yes = Available(300, (Range("all_reduce"),))
    made = initial_slate({"a": "1"}, answers_of(yes, yes, Unavailable("no NVLink"), Unavailable("no compiler")))
    assert made.offers == ()
    assert made.dropped == (Candidate("a", "unavailable", "no NVLink", 2, version="1"),)


def test_a_refusal_by_all_ranks_names_no_rank() -> None:
    made = initial_slate({"a": "1"}, answers_of(*[Unavailable("two hosts")] * 3))
    assert by_name(made.dropped) == {"a": ("unavailable", "two hosts", None)}


def test_answers_without_common_ranges_are_a_no() -> None:
    small, large = Range("all_reduce", max_nbytes=64), Range("all_reduce", min_nbytes=65)
    made = initial_slate({"a": "1"}, answers_of(Available(300, (small,)), Available(300, (large,))))
    assert by_name(made.dropped) == {"a": ("unavailable", "the ranks' answers have no range in common", None)}


def test_offers_are_ordered_by_priority_then_name() -> None:
    answers = {
        name: encode_answer(Available(p, (Range("all_reduce"),)))
        for name, p in zip("cabd", (200, 100, 200, 300), strict=True)
    }
    assert [offer.name for offer in initial_slate(dict.fromkeys("cabd"), [answers] * 2).offers] == ["d", "b", "c", "a"]


@patient
@given(generators())
def test_answers_merge_to_the_lowest_priority_and_what_every_rank_takes(rng: random.Random) -> None:
    answers = [
        Available(rng.randint(1, 999), tuple(a_range(rng, prepared=False) for _ in range(rng.randint(1, 3))))
        for _ in range(rng.randint(1, 4))
    ]
    made = initial_slate({"a": "1"}, answers_of(*answers))
    turned = initial_slate({"a": "1"}, answers_of(*reversed(answers)))
    merged = made.offers[0].ranges if made.offers else ()
    for offer in (*made.offers, *turned.offers):
        assert offer.priority == min(answer.priority for answer in answers)
    for _ in range(20):
        message = a_message(rng, [item for answer in answers for item in answer.ranges])
        expected = all(any(takes(item, message) for item in answer.ranges) for answer in answers)
        assert any(takes(item, message) for item in merged) == expected, (answers, message)
        assert (serves(turned.offers, message) == "a") == expected, (answers, message)


def test_operands_go_unvalidated_to_a_backend_that_checks_them_on_every_rank() -> None:
    yes, no = (Available(300, (Range("all_reduce"),), checks_operands=checks) for checks in (True, False))
    for answers, expected in (((yes, yes), True), ((yes, no), False), ((no, yes), False), ((no, no), False)):
        (offer,) = initial_slate({"a": "1"}, answers_of(*answers)).offers
        assert offer.checks_operands is expected


def test_answers_without_ranges_are_made_explicit() -> None:
    assert with_explicit_ranges(Available(500), ["all_reduce", "close"]) == Available(500, (Range("all_reduce"),))
    assert with_explicit_ranges(Available(500), ["all_reduce", OPS[1]]) == Available(500, tuple(map(Range, OPS[:2])))
    named = Available(500, (Range("all_reduce", max_nbytes=8),))
    assert with_explicit_ranges(named, ["all_reduce", OPS[1]]) == named


def test_an_answer_that_names_what_the_plugin_lacks_is_a_no() -> None:
    answer = with_explicit_ranges(Available(500, (Range(OPS[1]),)), ["all_reduce"])
    assert isinstance(answer, Unavailable)
    assert "all_reduce_add_rms_norm, which the plugin doesn't implement" in answer.reason


def test_a_backend_that_fails_leaves_its_place_to_the_next() -> None:
    made = Slate((Offer("a", 300, (Range("all_reduce"),), "1"), Offer("b", 200, (Range("all_reduce"),))))
    before = made.decision(("cpu",))
    assert [(c.name, c.verdict) for c in before.candidates] == [("a", "serves"), ("b", "standby"), (TERMINAL, "serves")]
    after = made.without("a", "connect raised", 3).decision(("cpu",), {"b": "but not for int8"})
    assert after.candidates == (
        Candidate("b", "serves", "but not for int8", priority=200),
        Candidate("a", "failed", "connect raised", 3, 300, "1"),
        Candidate(TERMINAL, "serves", "always available", priority=0),
    )
    assert after.routes[0].backend_for(1024) == "b"


def test_a_backend_that_is_narrowed_keeps_its_place_for_the_rest() -> None:
    made = Slate((Offer("a", 300, (Range("all_reduce"),)), Offer("b", 200, (Range("all_reduce"),))))
    decision = made.with_ranges("a", [Range("all_reduce", dtypes=("int8",))]).decision(("cpu",))
    served = {route.dtype: route.backend_for(1024) for route in decision.routes if route.op == "all_reduce"}
    assert served == {dtype: "a" if dtype == "int8" else "b" for dtype in DTYPES}


def test_without_any_backend_the_terminal_fallback_serves_everything() -> None:
    decision = Slate(()).decision(DEVICE_TYPES)
    assert [c.name for c in decision.candidates] == [TERMINAL]
    assert {route.backend_for(nbytes) for route in decision.routes for nbytes in (1, 1 << 40)} == {TERMINAL}
    assert len(decision.routes) == len(cells(DEVICE_TYPES))


@patient
@given(offers())
def test_a_candidate_serves_just_if_a_rule_names_it(made: tuple[Offer, ...]) -> None:
    decision = Slate(made).decision(DEVICE_TYPES)
    named = {rule.backend for route in decision.routes for rule in route.rules}
    verdicts = {c.name: c.verdict for c in decision.candidates}
    assert verdicts == {offer.name: "serves" if offer.name in named else "standby" for offer in made} | {
        TERMINAL: "serves"
    }
