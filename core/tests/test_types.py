from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from comm_core.types import DTYPES, OPS, Available, Candidate, Decision, Range, Route, Rule, Unavailable
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import Message, messages, ranges, takes

patient = settings(deadline=None, max_examples=150)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"op": "all_gather"}, ValueError, "op='all_gather' isn't one of all_reduce, all_reduce_add_rms_norm"),
        ({"modes": ("lazy",)}, ValueError, "modes has lazy; known are eager, graph"),
        ({"dtypes": ("float32", "float8_e4m3fn")}, ValueError, "dtypes has float8_e4m3fn"),
        ({"dtypes": ("torch.complex64",)}, ValueError, "dtypes has complex64"),
        ({"dtypes": ()}, ValueError, "dtypes is empty"),
        ({"modes": ()}, ValueError, "modes is empty"),
        ({"device_types": ()}, ValueError, "device_types is empty"),
        ({"dtypes": "float32"}, TypeError, "got the string 'float32'"),
        ({"modes": "eager"}, TypeError, "got the string 'eager'"),
        ({"device_types": "cuda"}, TypeError, "got the string 'cuda'"),
        ({"min_nbytes": -1}, ValueError, "min_nbytes=-1 is below 0"),
        ({"min_nbytes": 1.0}, TypeError, "min_nbytes=1.0 isn't an integer"),
        ({"min_nbytes": True}, TypeError, "min_nbytes=True isn't an integer"),
        ({"min_nbytes": 9, "max_nbytes": 8}, ValueError, "max_nbytes=8 is below 9"),
        ({"max_nbytes": "8"}, TypeError, "max_nbytes='8' isn't an integer"),
        ({"multiple_nbytes": 0}, ValueError, "multiple_nbytes=0 is below 1"),
        ({"max_tokens": 0}, ValueError, "max_tokens=0 is below 1"),
        ({"hidden_multiple": 0}, ValueError, "hidden_multiple=0 is below 1"),
    ],
)
def test_a_range_that_cannot_be_right_is_refused(fields: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as raised:
        Range(**{"op": "all_reduce", **fields})
    assert words in str(raised.value)


def test_a_range_takes_torch_dtypes_and_their_names() -> None:
    item = Range("all_reduce", dtypes=[torch.bfloat16, "float16", "torch.bfloat16"])  # type: ignore[arg-type]
    assert item.dtypes == ("bfloat16", "float16")


def test_every_routed_dtype_has_torchs_size() -> None:
    assert {name: getattr(torch, name).itemsize for name in DTYPES} == DTYPES


def test_a_range_is_frozen_and_can_be_a_key() -> None:
    item = Range("all_reduce", dtypes=("int8",))
    assert len({item, Range("all_reduce", dtypes=("int8",))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.max_nbytes = 1  # type: ignore[misc]


@patient
@given(ranges())
def test_json_brings_back_the_same_range(item: Range) -> None:
    assert Range.from_json(json.loads(json.dumps(item.to_json()))) == item


def test_json_of_a_range_is_what_differs_from_the_default() -> None:
    assert Range("all_reduce").to_json() == {"op": "all_reduce"}
    assert Range("all_reduce", max_nbytes=8).to_json() == {"op": "all_reduce", "max_nbytes": 8}


@patient
@given(ranges(), ranges(), st.data())
def test_an_intersection_takes_exactly_what_both_take(one: Range, other: Range, data: st.DataObject) -> None:
    both, turned = one.intersect(other), other.intersect(one)
    for _ in range(20):
        message = data.draw(messages([one, other], op=one.op))
        expected = takes(one, message) and takes(other, message)
        assert (both is not None and takes(both, message)) == expected
        assert (turned is not None and takes(turned, message)) == expected
    if both is not None:
        assert both.prepared == (one.prepared or other.prepared)


@patient
@given(ranges(largest=64), ranges(largest=64))
def test_an_intersection_is_none_just_where_no_message_is_in_both(one: Range, other: Range) -> None:
    both = one.intersect(other)
    shared = [
        (mode, device_type, dtype, nbytes)
        for mode in ("eager", "graph")
        for device_type in ("cuda", "cpu")
        for dtype in DTYPES
        for nbytes in range(math.lcm(one.multiple_nbytes, other.multiple_nbytes) + 128)
        if all(takes(item, Message(one.op, mode, device_type, dtype, nbytes)) for item in (one, other))
    ]
    assert (both is not None) == bool(shared)


@patient
@given(ranges())
def test_a_range_intersected_with_itself_is_itself(item: Range) -> None:
    multiple = item.multiple_nbytes
    is_empty = item.max_nbytes is not None and item.max_nbytes // multiple * multiple < item.min_nbytes
    assert item.intersect(item) == (None if is_empty else item)


def test_ranges_of_two_operations_have_nothing_in_common() -> None:
    assert Range(OPS[0]).intersect(Range(OPS[1])) is None


@patient
@given(ranges(prepared=False), st.data())
def test_a_rule_takes_the_sizes_of_its_range(item: Range, data: st.DataObject) -> None:
    limits = (item.min_nbytes, item.max_nbytes, item.multiple_nbytes, item.max_tokens, item.hidden_multiple)
    rule, anything = Rule("mine", *limits), dataclasses.replace(item, modes=None, dtypes=None, device_types=None)
    for _ in range(10):
        message = data.draw(messages([item], op=item.op))
        assert rule.takes(message.nbytes, message.num_tokens, message.hidden_size) == takes(anything, message)


@patient
@given(ranges())
def test_serves_is_what_takes_says_of_some_size(item: Range) -> None:
    anysize = Range(item.op, item.modes, item.dtypes, item.device_types)
    for mode in ("eager", "graph"):
        for device_type in ("cuda", "cpu"):
            for dtype in DTYPES:
                expected = takes(anysize, Message(item.op, mode, device_type, dtype, 48))
                assert item.serves(mode, device_type, dtype) == expected


@pytest.mark.parametrize("priority", [0, -1])
def test_a_priority_below_one_is_the_terminal_fallbacks_alone(priority: int) -> None:
    with pytest.raises(ValueError, match="priority"):
        Available(priority)


@pytest.mark.parametrize("priority", [1.5, "300", True, None])
def test_a_priority_is_an_integer(priority: Any) -> None:
    with pytest.raises(TypeError, match="priority"):
        Available(priority)


def test_available_takes_ranges_alone_and_freezes_them() -> None:
    assert Available(300, [Range("all_reduce")]).ranges == (Range("all_reduce"),)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"isn't a comm_core\.Range"):
        Available(300, ({"op": "all_reduce"},))  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["", "  ", None, 7])
def test_unavailable_needs_a_reason(reason: Any) -> None:
    with pytest.raises(TypeError, match="say why"):
        Unavailable(reason)


def test_a_decision_answers_by_name_and_by_kind_of_message() -> None:
    route = Route("all_reduce", "eager", "cpu", "int8", (Rule("a", max_nbytes=64), Rule("torch_distributed")))
    decision = Decision((Candidate("a", "serves", "available on every rank"),), (route,))
    assert decision.candidate("a") is decision.candidates[0]
    assert decision.candidate("b") is None
    assert decision.route("all_reduce", "eager", "cpu", "int8") is route
    assert [route.backend_for(nbytes) for nbytes in (1, 64, 65)] == ["a", "a", "torch_distributed"]
    with pytest.raises(LookupError, match="no route for all_reduce, graph, cpu, int8"):
        decision.route("all_reduce", "graph", "cpu", "int8")
    data = json.loads(json.dumps(decision.to_json()))
    assert data["candidates"][0]["name"] == "a"
    assert data["routes"][0]["rules"][0]["max_nbytes"] == 64
