from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from comm_core._plan.decide import with_explicit_ranges
from comm_core._plan.routes import Cell, Offer, cells, exclude_cells, owned_cells, owned_intervals, owners, plan_routes
from comm_core.types import DTYPES, MODES, OPS, TERMINAL, Available, Range, Route, Rule
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import DEVICE_TYPES, a_message, a_range, generators, offers, serves

patient = settings(deadline=None, max_examples=100)
# Past every edge of the ranges of 64 bytes at most that the exhaustive tests use, and past every period of theirs.
HORIZON = 1024


def all_ranges(made: Sequence[Offer]) -> list[Range]:
    return [item for offer in made for item in offer.ranges]


def test_a_group_has_a_cell_for_every_possible_call() -> None:
    assert cells(("cpu",)) == (
        *(("all_reduce", "eager", "cpu", dtype) for dtype in DTYPES),
        *((op, "eager", "cpu", dtype) for op in OPS[1:] for dtype in DTYPES if "float" in dtype),
    )
    found = cells(DEVICE_TYPES)
    assert len(found) == len(set(found)) == 27 + 12 + 12
    assert {cell[2] for cell in found if cell[1] == "graph"} == {"cuda"}


def test_a_backend_without_ranges_serves_what_it_implements() -> None:
    def served(*hooks: str) -> tuple[Range, ...]:
        answer = with_explicit_ranges(Available(500), hooks)
        assert isinstance(answer, Available)
        return answer.ranges

    assert served("close", "all_reduce") == (Range("all_reduce"),)
    assert served("all_reduce_add_rms_norm", "all_reduce") == tuple(Range(op) for op in OPS[:2])
    assert served("all_reduce_add_rms_norm_quant", "all_reduce") == (Range(OPS[0]), Range(OPS[2]))


@patient
@given(offers(), st.sampled_from([("cpu",), ("cuda",), DEVICE_TYPES]))
def test_every_kind_of_message_has_one_route_that_ends_in_the_terminal_fallback(
    made: tuple[Offer, ...], device_types: tuple[str, ...]
) -> None:
    routes = plan_routes(made, device_types)
    assert tuple((route.op, route.mode, route.device_type, route.dtype) for route in routes) == cells(device_types)
    assert all(route.rules[-1] == Rule(TERMINAL) for route in routes)
    assert all(rule.backend != TERMINAL for route in routes for rule in route.rules[:-1])


@settings(deadline=None, max_examples=400)
@given(offers(), generators())
def test_a_message_goes_to_the_first_offer_that_takes_it(made: tuple[Offer, ...], rng: random.Random) -> None:
    """Also shows that dropping shadowed rules changes nothing: the oracle knows no such rule."""
    routes = {(r.op, r.mode, r.device_type, r.dtype): r for r in plan_routes(made, DEVICE_TYPES)}
    for _ in range(8):
        m = a_message(rng, all_ranges(made))
        route = routes[m.op, m.mode, m.device_type, m.dtype]
        assert route.backend_for(m.nbytes, m.num_tokens, m.hidden_size) == serves(made, m), m


@patient
@given(offers())
def test_a_plan_depends_on_the_offers_alone(made: tuple[Offer, ...]) -> None:
    copies = tuple(Offer(o.name, o.priority, tuple(Range.from_json(r.to_json()) for r in o.ranges)) for o in made)
    assert plan_routes(made, DEVICE_TYPES) == plan_routes(made, DEVICE_TYPES) == plan_routes(copies, DEVICE_TYPES)


def dominates(other: Rule, rule: Rule, itemsize: int) -> bool:
    """Whether `other`, bounds apart, takes every message that `rule` takes; by trying them."""
    sizes = [n for n in range(itemsize, HORIZON, itemsize) if n % rule.multiple_nbytes == 0]
    hidden_sizes = [n for n in range(1, HORIZON) if n % rule.hidden_multiple == 0]
    most = rule.max_tokens or HORIZON
    return (
        all(n % other.multiple_nbytes == 0 for n in sizes)
        and all(n % other.hidden_multiple == 0 for n in hidden_sizes)
        and (other.max_tokens is None or most <= other.max_tokens)
    )


@patient
@given(offers(largest=64, most=3), st.data())
def test_a_rule_owns_exactly_the_sizes_that_no_rule_before_it_takes(
    made: tuple[Offer, ...], data: st.DataObject
) -> None:
    route = data.draw(st.sampled_from(plan_routes(made, ("cuda",))))
    itemsize = DTYPES[route.dtype]
    for index, rule in enumerate(route.rules):
        before = [other for other in route.rules[:index] if dominates(other, rule, itemsize)]
        mine = {n for n in range(itemsize, HORIZON, itemsize) if within(rule, n) and n % rule.multiple_nbytes == 0}
        expected = {n for n in mine if not any(within(other, n) for other in before)}
        found: set[int] = set()
        for low, high in owned_intervals(route, index):
            stretch = {n for n in mine if low <= n and (high is None or n <= high)}
            assert low in stretch
            assert high is None or high in stretch
            assert (high is None) == (max(stretch) + 48 * itemsize >= HORIZON)
            assert not stretch & found
            found |= stretch
        assert found == expected
        # Who owns nothing has no rule, but for the terminal fallback.
        assert expected or rule.backend == TERMINAL


def within(rule: Rule, nbytes: int) -> bool:
    return rule.min_nbytes <= nbytes and (rule.max_nbytes is None or nbytes <= rule.max_nbytes)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (Range("all_reduce"), ((4, None),)),
        (Range("all_reduce", min_nbytes=5, max_nbytes=15), ((8, 12),)),
        (Range("all_reduce", min_nbytes=5, max_nbytes=31, multiple_nbytes=6), ((12, 24),)),
        (Range("all_reduce", max_nbytes=3), None),
        (Range("all_reduce", min_nbytes=13, max_nbytes=15), None),
        (Range("all_reduce", prepared=True), None),
    ],
)
def test_bounds_are_rounded_to_sizes_that_exist(
    item: Range, expected: tuple[tuple[int, int | None], ...] | None
) -> None:
    (route,) = [
        r for r in plan_routes([Offer("a", 300, (item,))], ("cpu",)) if (r.op, r.dtype) == ("all_reduce", "float32")
    ]
    if expected is None:
        assert route.rules == (Rule(TERMINAL),)
    else:
        assert owned_intervals(route, 0) == expected


def test_a_backend_in_the_middle_leaves_two_stretches_to_the_next() -> None:
    made = [
        Offer("a", 300, (Range("all_reduce", min_nbytes=64, max_nbytes=128),)),
        Offer("b", 200, (Range("all_reduce"),)),
    ]
    route = plan_routes(made, ("cpu",))[0]
    assert [rule.backend for rule in route.rules] == ["a", "b", TERMINAL]
    assert owned_intervals(route, 1) == ((4, 60), (132, None))
    assert owned_intervals(route, 2) == ()


@patient
@given(offers())
def test_owners_are_the_backends_that_some_rule_names(made: tuple[Offer, ...]) -> None:
    routes = plan_routes(made, DEVICE_TYPES)
    named = {rule.backend for route in routes for rule in route.rules}
    assert owners(routes) == named - {TERMINAL}
    for name in "abcdefgh":
        assert bool(owned_cells(routes, name)) == (name in named)
    assert owned_cells(routes, TERMINAL) == set(cells(DEVICE_TYPES))


@patient
@given(generators())
def test_narrowing_removes_exactly_the_wrong_kinds(rng: random.Random) -> None:
    made = [a_range(rng) for _ in range(rng.randint(1, 4))]
    wrong: set[Cell] = set(rng.sample(cells(DEVICE_TYPES), rng.randint(0, 8)))
    before = Offer("a", 300, tuple(made))
    after = Offer("a", 300, exclude_cells(made, wrong, DEVICE_TYPES))
    for _ in range(20):
        m = a_message(rng, made)
        is_wrong = (m.op, m.mode, m.device_type, m.dtype) in wrong
        assert serves([after], m) == (TERMINAL if is_wrong else serves([before], m)), (made, wrong, m)
    assert {item.prepared for item in after.ranges} <= {item.prepared for item in made}


def test_narrowing_by_nothing_changes_nothing() -> None:
    made = (Range("all_reduce", max_nbytes=9), Range("all_reduce_add_rms_norm", prepared=True))
    assert exclude_cells(made, set(), DEVICE_TYPES) == made


def test_narrowing_by_all_kinds_leaves_nothing() -> None:
    assert exclude_cells((Range("all_reduce"), Range(OPS[1])), set(cells(DEVICE_TYPES)), DEVICE_TYPES) == ()


def test_a_graph_and_an_eager_call_may_have_two_owners() -> None:
    made = [Offer("a", 300, (Range("all_reduce", modes=("graph",)),)), Offer("b", 200, (Range("all_reduce"),))]
    by_mode = {route.mode: route for route in plan_routes(made, ("cuda",)) if route.op == "all_reduce"}
    assert [by_mode[mode].backend_for(1024) for mode in MODES] == ["b", "a"]


def test_route_finds_the_first_rule() -> None:
    rules = (Rule("a", max_nbytes=8), Rule("b", 4, 16, 4), Rule(TERMINAL))
    route = Route("all_reduce", "eager", "cpu", "int8", rules)
    assert [route.backend_for(n) for n in (8, 9, 12, 16, 20)] == ["a", TERMINAL, "b", "b", TERMINAL]
