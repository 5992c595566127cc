from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comm_core._group import admission
from comm_core._plan.cases import LARGEST_NBYTES, UNBOUNDED_NBYTES, admission_cases
from comm_core._plan.routes import Offer, owned_intervals, plan_routes
from comm_core.types import DTYPES, OPS, TERMINAL, Range, Route
from hypothesis import given, settings
from made_up import DEVICE_TYPES, Message, offers, takes

ALL_REDUCE, FUSED, _ = OPS
CPU = torch.device("cpu")
Hook = Callable[..., Any]


def route_of(made: Sequence[Offer], op: str, dtype: str) -> Route:
    (found,) = [r for r in plan_routes(made, ("cpu",)) if (r.op, r.dtype) == (op, dtype)]
    return found


def shapes(made: Sequence[Offer], name: str, op: str = ALL_REDUCE, dtype: str = "float32") -> list[tuple[int, ...]]:
    return [case.shape for case in admission_cases([route_of(made, op, dtype)], name)]


@settings(deadline=None, max_examples=150)
@given(offers())
def test_every_case_goes_to_the_backend_that_it_tests(made: tuple[Offer, ...]) -> None:
    routes = plan_routes(made, DEVICE_TYPES)
    by_cell = {(r.op, r.mode, r.device_type, r.dtype): r for r in routes}
    for name in "abcdefgh":
        found = admission_cases(routes, name)
        assert len(found) == len(set(found))
        for case in found:
            route = by_cell[case.cell]
            nbytes = math.prod(case.shape) * DTYPES[route.dtype]
            size = (nbytes,) if route.op == ALL_REDUCE else (nbytes, *case.shape)
            assert nbytes > 0
            assert route.backend_for(*size) == name


@settings(deadline=None, max_examples=150)
@given(offers())
def test_both_edges_of_all_that_a_backend_owns_are_tested(made: tuple[Offer, ...]) -> None:
    for route in plan_routes(made, ("cpu",)):
        if route.op != ALL_REDUCE:
            continue
        itemsize = DTYPES[route.dtype]
        for index, rule in enumerate(route.rules[:-1]):
            tested = {math.prod(case.shape) * itemsize for case in admission_cases([route], rule.backend)}
            step = math.lcm(itemsize, rule.multiple_nbytes)
            for low, high in owned_intervals(route, index):
                top = UNBOUNDED_NBYTES // step * step if high is None else high
                for edge, inwards in ((low, step), (top, -step)):
                    near = (edge + n * inwards for n in range(8))
                    mine = [n for n in near if low <= n <= top and route.backend_for(n) == rule.backend]
                    assert not mine or mine[0] in tested


def test_edges_are_sizes_of_the_dtype() -> None:
    made = [Offer("a", 300, (Range(ALL_REDUCE, min_nbytes=5, max_nbytes=4103),))]
    assert shapes(made, "a") == [(2,), (3,), (55,), (1025,)]
    assert shapes(made, "a", dtype="int8") == [(5,), (143,), (4103,)]


def test_odd_sizes_are_tested_near_both_ends_and_between() -> None:
    assert shapes([Offer("a", 300, (Range(ALL_REDUCE, max_nbytes=64 << 20),))], "a", dtype="bfloat16") == [
        *((1,), (725,), ((1 << 19) - 1,), (32 << 20,)),
    ]
    step = [Offer("a", 300, (Range(ALL_REDUCE, multiple_nbytes=16, min_nbytes=64, max_nbytes=4096),))]
    assert [numel // 8 for (numel,) in shapes(step, "a", dtype="bfloat16")] == [4, 5, 37, 255, 256]
    fused = shapes([Offer("a", 300, (Range(FUSED, hidden_multiple=8, max_tokens=100),))], "a", FUSED, "bfloat16")
    assert fused == [(1, 1024), (1, 1032), (11, 1032), (99, 1032), (100, 1024)]


def test_a_backend_that_owns_nothing_has_no_case() -> None:
    made = [Offer("a", 300, (Range(ALL_REDUCE),)), Offer("b", 200, (Range(ALL_REDUCE, max_nbytes=64),))]
    assert shapes(made, "b") == []
    assert shapes([Offer("a", 300, (Range(ALL_REDUCE, prepared=True),))], "a") == []


def test_sizes_are_bounded() -> None:
    assert shapes([Offer("a", 300, (Range(ALL_REDUCE),))], "a")[-1] == (UNBOUNDED_NBYTES // 4,)
    large = [Offer("a", 300, (Range(ALL_REDUCE, max_nbytes=1 << 40), Range(FUSED, max_nbytes=1 << 40)))]
    assert shapes(large, "a")[-1] == (LARGEST_NBYTES[ALL_REDUCE] // 4,)
    assert math.prod(shapes(large, "a", FUSED)[-1]) * 4 == LARGEST_NBYTES[FUSED]


def test_sizes_between_anothers_multiples_are_tested_at_both_edges() -> None:
    made = [Offer("a", 300, (Range(ALL_REDUCE, multiple_nbytes=16),)), Offer("b", 200, (Range(ALL_REDUCE),))]
    assert shapes(made, "b") == [(1,), (511,), (UNBOUNDED_NBYTES // 4 - 1,)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Range(FUSED, max_tokens=128), Range(FUSED)),
        (Range(FUSED, max_tokens=2048), Range(FUSED)),
        (Range(FUSED, hidden_multiple=256), Range(FUSED)),
        (Range(FUSED, max_tokens=128, hidden_multiple=256), Range(FUSED)),
        (Range(FUSED, max_nbytes=65536), Range(FUSED)),
        (Range(FUSED, max_tokens=8), Range(FUSED, max_tokens=16)),
        (Range(ALL_REDUCE), Range(FUSED, multiple_nbytes=48)),
        (Range(ALL_REDUCE), Range(FUSED, hidden_multiple=384)),
    ],
)
def test_what_another_leaves_of_the_fused_operation_is_tested(first: Range, second: Range) -> None:
    found = shapes([Offer("a", 300, (first,)), Offer("b", 200, (second,))], "b", FUSED, "bfloat16")
    assert found
    for num_tokens, hidden_size in found:
        message = Message(FUSED, "eager", "cpu", "bfloat16", num_tokens * hidden_size * 2, num_tokens, hidden_size)
        assert takes(second, message)
        assert not takes(first, message)


def test_the_fewest_and_the_most_tokens_are_tested() -> None:
    found = shapes([Offer("a", 300, (Range(FUSED, max_tokens=100),))], "a", FUSED)
    assert (found[0], found[-1]) == ((1, 1024), (100, 1024))
    second = [Offer("a", 300, (Range(FUSED, max_tokens=8),)), Offer("b", 200, (Range(FUSED, max_tokens=16),))]
    found = shapes(second, "b", FUSED)
    assert (found[0], found[-1]) == ((9, 1024), (16, 1024))


def test_the_terminal_fallback_is_never_tested_by_mistake() -> None:
    made = [Offer("a", 300, (Range(ALL_REDUCE, max_nbytes=64),))]
    assert all(shape[0] <= 16 for shape in shapes(made, "a"))
    assert shapes(made, TERMINAL)[0] == (17,)


# The pattern

# Up to where a dtype has every integer.
EXACT = {"bfloat16": 1 << 8, "float16": 1 << 11, "int8": 127, "uint8": 255, "int16": 32767}


# All small ones, and those around powers of two, where the largest term of a dtype changes.
WORLD_SIZES = (*range(2, 10), 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)


def values(dtype: str, world_size: int, salt: int = 3) -> torch.Tensor:
    """What each rank sends, and the residual last: `[world_size + 1, period]`."""
    tester = admission._Tester({}, None, 0, world_size, CPU)
    return torch.stack([tester._values(dtype, rank, salt) for rank in range(world_size + 1)])


def different(rows: torch.Tensor) -> int:
    """How many different rows there are."""
    return len({row.tobytes() for row in rows.numpy()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_exact_in_every_order_of_adding(dtype: str) -> None:
    kind = getattr(torch, dtype)
    for world_size in (*WORLD_SIZES, 128, 300):
        terms = values(dtype, world_size)
        total = torch.zeros(terms.shape[1], dtype=kind)
        for term in terms:
            total += term.to(kind)
        assert torch.equal(total.to(torch.int64), terms.sum(0)), f"{world_size} ranks"
        # No partial sum is larger than the whole, so that no other order rounds or overflows either.
        assert terms.min() >= 0
        if world_size <= 64:
            assert terms.max() * len(terms) <= EXACT.get(dtype, 1 << 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rank_left_out_taken_twice_or_shifted_changes_the_sum(dtype: str) -> None:
    """A hundred elements show it, wherever in the message they are."""
    for world_size in WORLD_SIZES:
        terms = values(dtype, world_size)
        for start in (0, 500, terms.shape[1] - 100):
            part = terms[:, start : start + 100]
            assert part.any(1).all(), f"{world_size} ranks: one that is left out isn't missed"
            # One taken for another: all rows differ.
            assert different(part) == world_size + 1, f"{world_size} ranks: two have the same values"
    for world_size in (2, 8, 64):
        for term in values(dtype, world_size):
            shifts = term.repeat(2).unfold(0, 100, 1)[: len(term)]
            assert different(shifts) == len(term), f"{world_size} ranks: a shift isn't seen"


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_call_has_other_data(dtype: str) -> None:
    for world_size in (2, 8, 64):
        rows = torch.cat([values(dtype, world_size, salt)[:, :100] for salt in range(8)])
        assert different(rows) == len(rows)
