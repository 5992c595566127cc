"""The routes of deterministic groups: who serves doesn't change a bit, and nothing else decides who serves."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from comm_core._group.ordered_values import ordered_values
from comm_core._handle import pieces
from comm_core._handle.rank_order import sum_in_rank_order
from comm_core._plan.cases import admission_cases
from comm_core._plan.decide import Slate, encode_answer, initial_slate
from comm_core._plan.explain import explain
from comm_core._plan.routes import Offer
from comm_core.topology import Host, RankInfo, Topology
from comm_core.tuning import Tuning, parse_rules
from comm_core.types import DTYPES, OPS, RANK_ORDER_FP32, TERMINAL, Available, Range, Rule
from hypothesis import given, settings
from made_up import DEVICE_TYPES, a_message, generators, offers

PLAIN, FUSED, QUANT = OPS
CAP = 1 << 16


def slate(*ranges: Range, name: str = "a", numerics: str = RANK_ORDER_FP32) -> Slate:
    return Slate((Offer(name, 300, ranges, "1", numerics=numerics),)).as_deterministic()


def rules(made: Slate, op: str = PLAIN, dtype: str = "bfloat16", mode: str = "eager") -> tuple[Rule, ...]:
    return made.decision(DEVICE_TYPES).route(op, mode, "cuda", dtype).rules


def test_a_message_above_the_largest_goes_in_pieces() -> None:
    whole, piece, last = rules(slate(Range(PLAIN, max_nbytes=CAP + 3)))
    assert whole == Rule("a", max_nbytes=CAP + 3)
    assert piece == Rule("a", piece_nbytes=CAP)  # aligned pieces
    assert last == Rule(TERMINAL)
    assert all(piece.takes(nbytes) for nbytes in (2, CAP + 2, 1 << 40))


@pytest.mark.parametrize(
    "item",
    [
        Range(PLAIN, max_nbytes=CAP, min_nbytes=64),  # the last piece may be smaller
        Range(PLAIN, max_nbytes=14),  # no piece is aligned
        Range(PLAIN),
        Range(PLAIN, modes=("graph",), max_nbytes=CAP),
    ],
)
def test_what_cant_be_cut_falls_to_the_end(item: Range) -> None:
    assert not any(rule.piece_nbytes for rule in rules(slate(item)))
    assert rules(slate(item))[-1] == Rule(TERMINAL)


def test_pieces_are_of_the_backend_with_the_largest_messages() -> None:
    made = Slate(
        (
            Offer("small", 300, (Range(PLAIN, max_nbytes=64),), numerics=RANK_ORDER_FP32),
            Offer("large", 200, (Range(PLAIN, max_nbytes=CAP),), numerics=RANK_ORDER_FP32),
        )
    ).as_deterministic()
    assert [rule.backend for rule in rules(made)] == ["small", "large", "large", TERMINAL]
    assert rules(made)[2].piece_nbytes == CAP


def test_all_rows_of_one_length_go_one_way() -> None:
    made = slate(Range(FUSED, max_nbytes=CAP, hidden_multiple=8))
    assert rules(made, FUSED) == rules(made, FUSED, mode="graph")
    whole, piece, last = rules(made, FUSED)
    assert (whole.max_nbytes, whole.piece_nbytes, piece.max_nbytes, piece.piece_nbytes) == (CAP, None, None, CAP)
    assert last == Rule(TERMINAL)
    route = made.decision(DEVICE_TYPES).route(FUSED, "eager", "cuda", "bfloat16")
    for hidden_size, owner in ((8, "a"), (2880, "a"), (CAP // 2, "a"), (CAP // 2 + 8, TERMINAL), (35, TERMINAL)):
        counts = (1, 2, 3, 100, 6000)
        assert {route.backend_for(n * hidden_size * 2, n, hidden_size) for n in counts} == {owner}


@pytest.mark.parametrize(
    "item",
    [
        Range(FUSED, max_nbytes=CAP, hidden_multiple=8, max_tokens=512),
        Range(FUSED, max_nbytes=CAP, hidden_multiple=8, min_nbytes=4096),
        Range(FUSED, max_nbytes=CAP, hidden_multiple=8, multiple_nbytes=64),
        Range(FUSED, max_nbytes=CAP),  # rows that begin anywhere
        Range(FUSED, max_nbytes=CAP, hidden_multiple=8, modes=("eager",)),
        Range(FUSED, max_nbytes=CAP, hidden_multiple=8, modes=("graph",)),
        Range(FUSED, max_nbytes=CAP, hidden_multiple=8, prepared=True),
    ],
)
def test_a_backend_for_some_rows_alone_serves_none(item: Range) -> None:
    for mode in ("eager", "graph"):
        assert rules(slate(Range(PLAIN), item), FUSED, mode=mode) == (Rule(TERMINAL),)


def test_a_mode_that_failed_takes_the_other_along() -> None:
    made = slate(Range(PLAIN), Range(FUSED, max_nbytes=CAP, hidden_multiple=8))
    left = made.without_cells("a", {(FUSED, "graph", "cuda", "bfloat16"): ("wrong", None)}, DEVICE_TYPES)
    for mode in ("eager", "graph"):
        assert rules(left, FUSED, mode=mode) == (Rule(TERMINAL),)
        assert len(rules(left, FUSED, "float16", mode)) == 3


def test_a_preparation_adds_no_fused_ranges() -> None:
    before = Range(FUSED, max_nbytes=CAP, hidden_multiple=8)
    made = slate(Range(PLAIN, max_nbytes=64), before)
    larger = [Range(PLAIN, max_nbytes=CAP), before, Range(FUSED, hidden_multiple=16)]
    after = made.with_prepared_ranges("a", larger)
    assert after.offer("a").ranges == tuple(larger[:2])
    assert rules(after, FUSED) == rules(made, FUSED)
    free = dataclasses.replace(made, deterministic=False).with_prepared_ranges("a", larger)
    assert free.offer("a").ranges == tuple(larger)


@settings(deadline=None, max_examples=200)
@given(offers(), generators())
def test_the_number_of_rows_never_decides(made: tuple[Offer, ...], rng: random.Random) -> None:
    claimed = tuple(dataclasses.replace(offer, numerics=RANK_ORDER_FP32) for offer in made)
    decision = Slate(claimed).as_deterministic().decision(DEVICE_TYPES)
    for route in decision.routes:
        assert route.rules[-1] == Rule(TERMINAL)
    device_type = rng.choice(DEVICE_TYPES)
    dtype = rng.choice([name for name in DTYPES if "float" in name])
    hidden_size = rng.randint(1, 256)
    counts = (1, rng.randint(2, 64), rng.randint(2, 64), rng.randint(65, 6000))
    owners = {
        route.backend_for(count * hidden_size * DTYPES[dtype], count, hidden_size)
        for route in decision.routes
        if (route.op, route.device_type, route.dtype) == (FUSED, device_type, dtype)
        for count in counts
    }
    assert len(owners) == 1, (device_type, dtype, hidden_size, counts)


def test_a_backend_quantises_what_it_norms() -> None:
    fused = Range(FUSED, max_nbytes=CAP, hidden_multiple=8)
    some = Range(QUANT, min_nbytes=64, max_nbytes=CAP // 2, hidden_multiple=6, max_tokens=512)
    for item, rule in (
        (some, Rule("a", 64, CAP // 2, max_tokens=512, hidden_multiple=24)),
        (Range(QUANT), Rule("a", max_nbytes=CAP, hidden_multiple=8)),
    ):
        assert rules(slate(fused, item), QUANT) == (rule, Rule(TERMINAL))
    # One mode is enough: composed calls have the same bits.
    made = slate(fused, Range(QUANT, modes=("graph",)))
    assert rules(made, QUANT) == (Rule(TERMINAL),)
    assert len(rules(made, QUANT, mode="graph")) == 2


@pytest.mark.parametrize(
    "ranges",
    [
        (Range(QUANT),),
        (Range(QUANT), Range(FUSED, max_nbytes=CAP, hidden_multiple=8, max_tokens=512)),
        (Range(QUANT), Range(FUSED, max_nbytes=CAP, hidden_multiple=8, dtypes=("float16",))),
        (Range(QUANT, min_nbytes=64), Range(FUSED, max_nbytes=63, hidden_multiple=8)),
    ],
)
def test_what_a_backend_doesnt_norm_it_doesnt_quantise(ranges: tuple[Range, ...]) -> None:
    assert rules(slate(Range(PLAIN), *ranges), QUANT) == (Rule(TERMINAL),)


def test_another_backends_rows_are_composed() -> None:
    fused = Range(FUSED, max_nbytes=CAP, hidden_multiple=8)
    made = Slate(
        (
            Offer("first", 300, (fused,), numerics=RANK_ORDER_FP32),
            Offer("second", 200, (fused, Range(QUANT, max_nbytes=CAP)), numerics=RANK_ORDER_FP32),
        )
    ).as_deterministic()
    assert rules(made, FUSED)[0].backend == "first"
    assert rules(made, QUANT) == (Rule(TERMINAL),)
    # Once the first one has failed, the second one norms and quantises.
    assert [rule.backend for rule in rules(made.without("first", "wrong"), QUANT)] == ["second", TERMINAL]


@settings(deadline=None, max_examples=200)
@given(offers(), generators())
def test_who_quantises_norms_the_same_rows(made: tuple[Offer, ...], rng: random.Random) -> None:
    claimed = tuple(dataclasses.replace(offer, numerics=RANK_ORDER_FP32) for offer in made)
    decision = Slate(claimed).as_deterministic().decision(DEVICE_TYPES)
    near = [item for offer in made for item in offer.ranges if item.op != PLAIN]
    for _ in range(20):
        message = a_message(rng, near, QUANT)
        cell = message.mode, message.device_type, message.dtype
        size = message.nbytes, message.num_tokens, message.hidden_size
        owner = decision.route(QUANT, *cell).backend_for(*size)
        assert owner in (TERMINAL, decision.route(FUSED, *cell).backend_for(*size)), message


@settings(deadline=None, max_examples=100)
@given(offers())
def test_the_admission_test_sends_no_piece_that_is_too_large(made: tuple[Offer, ...]) -> None:
    """A backend is tested as if there were no pieces, with no message above its largest."""
    claimed = tuple(dataclasses.replace(offer, numerics=RANK_ORDER_FP32) for offer in made)
    routes = Slate(claimed).as_deterministic().routes(DEVICE_TYPES)
    for offer in claimed:
        for case in admission_cases(routes, offer.name):
            nbytes = torch.Size(case.shape).numel() * DTYPES[case.cell[3]]
            shape = case.shape if len(case.shape) == 2 else (1, 0)
            assert any(
                item.op == case.cell[0]
                and item.serves(*case.cell[1:])
                and not item.prepared
                and item.min_nbytes <= nbytes
                and (item.max_nbytes is None or nbytes <= item.max_nbytes)
                and nbytes % item.multiple_nbytes == 0
                and (item.max_tokens is None or shape[0] <= item.max_tokens)
                and shape[1] % item.hidden_multiple == 0
                for item in offer.ranges
            ), case


def test_tuning_rules_hold_for_sums_alone() -> None:
    ranges = (Range(PLAIN, max_nbytes=CAP), Range(FUSED, max_nbytes=CAP, hidden_multiple=8))
    tuning = Tuning(parse_rules("torch_distributed:0-64:eager:inf"))
    made = dataclasses.replace(slate(*ranges), tuning=tuning)
    assert [rule.backend for rule in rules(made)] == [TERMINAL, "a", "a", TERMINAL]
    assert rules(made, FUSED) == rules(slate(*ranges), FUSED)


def test_backends_of_other_numerics_are_left_out_with_the_reason() -> None:
    made = slate(Range(PLAIN), numerics="")
    assert made.offers == ()
    decision = made.decision(("cpu",))
    (left_out, terminal) = decision.candidates
    assert left_out.verdict == "unavailable"
    assert (
        left_out.reason == "the group is deterministic, which takes rank_order_fp32; the numerics of a are unspecified"
    )
    assert terminal.reason.endswith("it gathers the ranks' tensors, and core sums them in rank order")
    assert decision.deterministic
    text = explain("g", Topology.of([RankInfo(0, Host("one", "1"))], ("cpu",)), decision)
    assert text.startswith("g: 1 rank on one host, CPU tensors, deterministic\n")


def test_ranks_whose_numerics_differ_have_none() -> None:
    answers = [
        {"a": encode_answer(Available(300, (Range(PLAIN),), numerics=name))} for name in (RANK_ORDER_FP32, "tree")
    ]
    assert initial_slate({"a": "1"}, answers[:1] * 2).offer("a").numerics == RANK_ORDER_FP32
    assert initial_slate({"a": "1"}, answers).offer("a").numerics == ""


@pytest.mark.parametrize("wrong", [None, 3, "a\nb", "x" * 65])
def test_numerics_are_a_short_name(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Available(1, numerics=wrong)  # type: ignore[arg-type]


class Doubles:
    """A hook's session that notes the sizes of its calls."""

    def __init__(self) -> None:
        self.nbytes: list[int] = []


def double(session: Doubles, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    session.nbytes.append(tensor.nbytes)
    assert out is not None
    assert tensor.data_ptr() % 16 == out.data_ptr() % 16 == 0
    return torch.add(tensor, tensor, out=out)


@pytest.mark.parametrize("numel", [1, 32, 33, 100])
@pytest.mark.parametrize("in_place", [True, False])
def test_pieces_together_are_the_message(numel: int, in_place: bool) -> None:
    session, x = Doubles(), torch.arange(float(numel))
    expected = x * 2
    out = x if in_place else None
    result = pieces.all_reduce((double, session, 128), x, out)
    assert torch.equal(result, expected)
    assert in_place is (result is x)
    assert session.nbytes == [128] * (numel // 32) + [numel % 32 * 4] * (numel % 32 > 0)


def declines(_session: object, tensor: torch.Tensor, *_: object) -> object:
    return NotImplemented if bool(tensor.isnan().any()) else (tensor, tensor)


def test_a_hook_that_declines_the_first_rows_declines_the_call() -> None:
    x = torch.zeros(4, 8)
    x[0, 0] = torch.nan
    call = (x, x, torch.ones(8), 1e-6, 0.0, None, None)
    assert pieces.all_reduce_add_rms_norm((declines, None, 64), *call) is NotImplemented
    with pytest.raises(NotImplementedError, match="declined some of a message's rows"):
        pieces.all_reduce_add_rms_norm((declines, None, 64), x.flip(0), *call[1:])


def wrongly(terms: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    own = terms[0].clone()
    for term in terms[1:]:
        own = own + term
    return {
        "reversed": sum_in_rank_order(terms[::-1]),
        "rotated": sum_in_rank_order([*terms[1:], terms[0]]),
        "own": own,
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("ranks", [3, 4, 8, 64])
def test_the_data_of_the_admission_test_tell_one_order_from_another(dtype: str, ranks: int) -> None:
    terms = [ordered_values(dtype, rank, ranks + 1, 3, 1021) for rank in range(ranks)]
    right = sum_in_rank_order(terms)
    assert right.isfinite().all()
    for name, wrong in wrongly(terms).items():
        if name == "own" and dtype in ("float32", "float64"):
            continue  # their own type is right
        assert int((wrong != right).sum()) > 5, name
