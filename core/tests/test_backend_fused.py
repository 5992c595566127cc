from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
from comm_core._handle import fallback
from comm_core._handle.lookup import BoundHook, CallKey, FusedRoutes
from comm_core.types import TERMINAL, Range
from fake_handle import ALL_REDUCE, FUSED, Fake, aligned, fused_inputs, handle, one_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import Message, offers, serves
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor

if TYPE_CHECKING:
    from comm_core._plan.routes import Offer


@pytest.fixture(params=["core", "native"], autouse=True)
def who_looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call goes to a backend whose operands core looks at, and to one whose native code does."""
    if request.param == "native":
        monkeypatch.setattr(Fake, "fit", staticmethod(request.getfixturevalue("native").fit))
        monkeypatch.setattr(FusedRoutes, "get", known_or_found)
    return str(request.param)


def known_or_found(routes: FusedRoutes, key: CallKey) -> BoundHook | None:
    """As if a call with this key had been served before: core validates the first one in any case."""
    _, dtype, shape = key
    known = dict.get(routes, key)
    return routes.find(key) if known is None and len(shape) == 2 and dtype.is_floating_point else known


def expected_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return fallback.add_rms_norm(2 * x.clone(), residual.clone(), weight.clone(), 1e-5, 1.0, None, None)


OUTS = (None, "x", "residual", "other", "transposed", "misaligned")
RESIDUAL_OUTS = (None, "residual", "x", "new", "transposed", "misaligned")


@pytest.mark.parametrize("served", [Range(FUSED), Range(ALL_REDUCE)])
@pytest.mark.parametrize(
    ("out", "residual_out"), [(y, s) for y, s in itertools.product(OUTS, RESIDUAL_OUTS) if y is None or y != s]
)
def test_fused_results_go_where_they_are_asked_to(served: Range, out: str | None, residual_out: str | None) -> None:
    backend, _, _ = one_backend(served)
    tensors = fused_inputs()
    tensors["transposed"], tensors["misaligned"] = torch.empty(8, 4).t(), aligned(32, offset=1).view(4, 8)
    x, residual, weight = tensors["x"], tensors["residual"], tensors["weight"]
    expected = expected_norm(x, residual, weight)
    targets = [None if name is None else tensors[name] for name in (out, residual_out)]
    results = backend.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 1.0, out=targets[0], residual_out=targets[1])
    for result, target, due in zip(results, targets, expected, strict=True):
        assert result is target or target is None
        assert torch.equal(result, due)


@pytest.mark.parametrize("odd", ["x", "residual", "weight"])
@pytest.mark.parametrize("in_place", [False, True])
def test_fused_inputs_that_hooks_cannot_take_are_staged(odd: str, *, in_place: bool) -> None:
    backend, fast, _ = one_backend()
    tensors = fused_inputs()
    numel = tensors[odd].numel()
    strided = torch.zeros(2 * numel)[::2].copy_(tensors[odd].flatten())
    misaligned = aligned(numel, offset=1).copy_(tensors[odd].flatten())
    for variant in (strided.as_strided(tensors[odd].shape, [s * 2 for s in tensors[odd].stride()]), misaligned):
        mine = {name: tensor.clone() for name, tensor in tensors.items()} | {odd: variant.view(tensors[odd].shape)}
        x, residual, weight = mine["x"], mine["residual"], mine["weight"]
        expected = expected_norm(x, residual, weight)
        targets = {"out": x, "residual_out": residual} if in_place else {}
        y, s = backend.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 1.0, **targets)
        assert torch.equal(y, expected[0])
        assert torch.equal(s, expected[1])
        assert not in_place or (y is x and s is residual)
    assert len(fast.calls) == 2


def test_fused_outputs_in_place_reach_the_hook() -> None:
    backend, fast, _ = one_backend()
    tensors = fused_inputs()
    x, residual = tensors["x"], tensors["residual"]
    backend.all_reduce_add_rms_norm(x, residual, tensors["weight"], out=x, residual_out=residual)
    assert fast.calls[0][-2] is x
    assert fast.calls[0][-1] is residual


def test_one_tensor_may_be_both_input_and_residual() -> None:
    for targets in ({}, {"out": 0}, {"residual_out": 0}):
        backend, _, _ = one_backend()
        x, weight = aligned(32).view(4, 8), aligned(8)
        expected = expected_norm(x, x, weight)
        results = backend.all_reduce_add_rms_norm(x, x, weight, 1e-5, 1.0, **dict.fromkeys(targets, x))
        assert all(map(torch.equal, results, expected))


@settings(deadline=None, max_examples=150)
@given(offers(largest=512), st.integers(1, 70), st.sampled_from([1, 2, 8, 24, 64, 192]))
def test_each_shape_of_the_fused_operation_goes_to_the_backend_of_its_route(
    made: tuple[Offer, ...], num_tokens: int, hidden_size: int
) -> None:
    fakes = {name: Fake() for name in (*"abcdefgh", TERMINAL)}
    backend = handle(made, fakes)
    x, weight = aligned(num_tokens * hidden_size).view(num_tokens, hidden_size), aligned(hidden_size)
    residual = x.clone()
    fused = serves(made, Message(FUSED, "eager", "cpu", "float32", x.nbytes, num_tokens, hidden_size))
    plain = serves(made, Message(ALL_REDUCE, "eager", "cpu", "float32", x.nbytes))
    _, s = backend.all_reduce_add_rms_norm(x, residual, weight)
    assert torch.equal(s, 3 * x)
    assert [name for name, fake in fakes.items() if fake.calls] == [plain if fused == TERMINAL else fused]


def test_tokens_and_hidden_sizes_have_edges() -> None:
    backend, fast, last = one_backend(Range(FUSED, max_tokens=4, hidden_multiple=8))
    for num_tokens, hidden_size, goes_to in ((4, 8, fast), (5, 8, last), (4, 12, last), (1, 16, fast), (4, 4, last)):
        x = aligned(num_tokens * hidden_size).view(num_tokens, hidden_size)
        backend.all_reduce_add_rms_norm(x, x.clone(), torch.ones(hidden_size))
        assert goes_to.calls.pop()
        assert fast.calls == last.calls == []


def test_an_empty_fused_call_takes_its_turn_as_one_zero() -> None:
    backend, fast, last = one_backend()
    y, s = backend.all_reduce_add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8))
    assert (y.shape, s.shape) == ((0, 8), (0, 8))
    assert [sent.numel() for _, sent, _ in fast.calls] == [1]
    assert not last.calls


@pytest.mark.parametrize(
    "shapes",
    [
        ((), (), ()),
        ((4,), (1, 4), (4,)),
        ((2, 4), (2, 3), (4,)),
        ((3, 2, 4), (3, 2, 4), (2,)),
        ((2, 4), (2, 4), (2,)),
        ((2, 4), (2, 4), (1, 4)),
        ((1, 2, 4), (1, 2, 4), (2, 4)),
    ],
)
def test_fused_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    backend, fast, _ = one_backend()
    x, residual, weight = map(torch.ones, shapes)
    with pytest.raises(ValueError, match="num_tokens, hidden_size"):
        backend.all_reduce_add_rms_norm(x, residual, weight)
    assert not fast.calls


@pytest.mark.parametrize("served", [Range(FUSED), Range(ALL_REDUCE)])
@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (1, 1, 2, 8), (2, 0, 8)])
@pytest.mark.parametrize("place", ["new", "others", "strided", "in place"])
def test_any_number_of_leading_dimensions_is_taken_as_rows(served: Range, shape: tuple[int, ...], place: str) -> None:
    backend, _, _ = one_backend(served)
    numel = math.prod(shape)
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(8)
    rows = (numel // 8, 8)
    expected = backend.all_reduce_add_rms_norm(x.view(rows), residual.view(rows), weight, 1e-5, 1.0)
    expected = [each.clone().view(shape) for each in expected]
    kept = x.clone(), residual.clone()
    outs: dict[str, torch.Tensor] = {}
    if place == "in place":
        outs = {"out": x, "residual_out": residual}
    elif place != "new":
        step = 2 if place == "strided" else 1
        outs = {name: torch.empty(*shape[:-1], 8 * step)[..., ::step] for name in ("out", "residual_out")}
    results = backend.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 1.0, **outs)
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)
    assert all(result is out for result, out in zip(results, outs.values(), strict=False))
    if place != "in place":
        assert torch.equal(x, kept[0])
        assert torch.equal(residual, kept[1])


def test_fused_dtypes_that_do_not_fit_are_refused() -> None:
    backend, fast, _ = one_backend()
    x, weight = torch.ones(2, 4), torch.ones(4)
    for arguments in ((x, x.double(), weight), (x, x, weight.double()), (x.int(), x.int(), weight.int())):
        with pytest.raises(TypeError, match="one floating dtype"):
            backend.all_reduce_add_rms_norm(*arguments)
    assert not fast.calls


@pytest.mark.parametrize("served", [Range(FUSED), Range(ALL_REDUCE)])
@pytest.mark.parametrize("out", [torch.ones(2, 3), torch.ones(1, 4), torch.ones(2, 4, dtype=torch.float64)])
def test_a_fused_out_unlike_the_tensor_is_refused_by_every_backend(served: Range, out: torch.Tensor) -> None:
    backend, fast, last = one_backend(served)
    each: list[dict[str, Any]] = [{"out": out}, {"residual_out": out}]
    for targets in each:
        with pytest.raises(ValueError, match="out is"):
            backend.all_reduce_add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), **targets)
    assert not fast.calls
    assert not last.calls


@pytest.mark.parametrize("out", [torch.ones(2, 8).to_sparse(), torch.ones(2, 8, device="meta")])
def test_a_fused_out_that_native_code_cannot_even_look_at_is_refused(out: torch.Tensor) -> None:
    backend, fast, last = one_backend()
    x, weight = aligned(16).view(2, 8), aligned(8)
    backend.all_reduce_add_rms_norm(x, x.clone(), weight)
    fast.calls.clear()
    each: list[dict[str, Any]] = [{"out": out}, {"residual_out": out}]
    for targets in each:
        with pytest.raises(ValueError, match="out is"):
            backend.all_reduce_add_rms_norm(x, x.clone(), weight, **targets)
    assert not fast.calls
    assert not last.calls


@pytest.mark.parametrize("served", [Range(FUSED), Range(ALL_REDUCE)])
@pytest.mark.parametrize("on_meta", ["x", "residual", "weight", "all"])
def test_fused_tensors_on_another_device_are_refused_before_anything_is_sent(served: Range, on_meta: str) -> None:
    # Torch's device "meta" has no index, like the CPU.
    backend, fast, last = one_backend(served)
    tensors = {"x": aligned(16).view(2, 8), "residual": aligned(16).view(2, 8), "weight": aligned(8)}
    tensors = {name: t.to("meta") if on_meta in (name, "all") else t for name, t in tensors.items()}
    with pytest.raises(ValueError, match="on meta can't be reduced" if on_meta in ("x", "all") else "one device"):
        backend.all_reduce_add_rms_norm(*tensors.values())
    assert not fast.calls
    assert not last.calls


@pytest.mark.parametrize("served", [Range(FUSED), Range(ALL_REDUCE)])
def test_what_does_not_fit_is_refused_also_where_a_call_of_that_shape_was_served(served: Range) -> None:
    backend, fast, last = one_backend(served)
    x, weight = aligned(16).view(2, 8), aligned(8)
    backend.all_reduce_add_rms_norm(x, x.clone(), weight)
    fast.calls.clear()
    wrong: list[tuple[tuple[torch.Tensor, ...], type[Exception], str]] = [
        ((x, x[:1], weight), ValueError, "num_tokens, hidden_size"),
        ((x, x, weight.view(1, 8)), ValueError, "num_tokens, hidden_size"),
        ((x, x, weight[:4]), ValueError, "num_tokens, hidden_size"),
        ((x, x.double(), weight), TypeError, "one floating dtype"),
        ((x, x, weight.bfloat16()), TypeError, "one floating dtype"),
        ((x.int(), x.int(), weight.int()), TypeError, "one floating dtype"),
        ((x.to("meta"), x, weight), ValueError, "on meta can't be reduced"),
        ((x, x.to("meta"), weight), ValueError, "expected one device"),
        ((x, x, weight.to("meta")), ValueError, "expected one device"),
        ((x.to_sparse(), x, weight), TypeError, "sparse_coo"),
    ]
    for arguments, kind, words in wrong:
        with pytest.raises(kind, match=words):
            backend.all_reduce_add_rms_norm(*arguments)
    assert not fast.calls
    assert not last.calls


@pytest.mark.parametrize("odd", ["x", "residual", "weight"])
def test_sparse_tensors_are_refused_where_a_backend_fuses(odd: str) -> None:
    backend, fast, _ = one_backend()
    dense = {"x": aligned(16).view(2, 8), "residual": aligned(16).view(2, 8), "weight": aligned(8)}
    for _ in range(2):
        with pytest.raises(TypeError, match=r"sparse_coo.*convert it first"):
            backend.all_reduce_add_rms_norm(*(dense | {odd: dense[odd].to_sparse()}).values())
        assert not fast.calls
        backend.all_reduce_add_rms_norm(*dense.values())
        fast.calls.clear()


@pytest.mark.parametrize("wrapped", ["x", "residual", "weight"])
def test_fused_tensors_that_are_waited_for_reach_the_hook_as_what_they_stand_for(wrapped: str) -> None:
    backend, fast, _ = one_backend(Range(FUSED))
    tensors = {"x": aligned(16).view(2, 8), "residual": aligned(16).view(2, 8), "weight": aligned(8)}
    expected = expected_norm(*tensors.values())
    tensors[wrapped] = AsyncCollectiveTensor(tensors[wrapped])
    results = backend.all_reduce_add_rms_norm(*tensors.values(), 1e-5, 1.0)
    assert all(map(torch.equal, results, expected))
    assert len(fast.calls) == 1


@pytest.mark.parametrize("wrapped", ["x", "residual", "weight", "new", "other"])
def test_views_of_fused_tensors_that_are_waited_for(wrapped: str) -> None:
    # Torch gives them an address, 64, like one that kernels take.
    backend, fast, _ = one_backend(Range(FUSED))
    tensors = fused_inputs()
    expected = expected_norm(tensors["x"], tensors["residual"], tensors["weight"])
    rows = tensors[wrapped].view(-1, 8)
    behind = AsyncCollectiveTensor(torch.cat([torch.zeros(2, 8), rows]))[2:].view(tensors[wrapped].shape)
    assert (type(behind), behind.data_ptr()) == (AsyncCollectiveTensor, 64)
    tensors[wrapped] = behind
    x, residual, weight, out, residual_out = tensors.values()
    for _ in range(2):
        backend.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 1.0, out=out, residual_out=residual_out)
        assert torch.equal(out, expected[0])
        assert torch.equal(residual_out, expected[1])
        assert len(fast.calls) == 1
        fast.calls.clear()


def test_a_fused_out_of_which_several_elements_are_one_is_refused() -> None:
    backend, fast, _ = one_backend()
    for name in ("out", "residual_out"):
        targets = {name: torch.zeros(1, 8).expand(2, 8)}
        with pytest.raises(ValueError, match="several elements at one address"):
            backend.all_reduce_add_rms_norm(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), **targets)
    assert not fast.calls


def test_outputs_that_share_memory_are_refused_before_anything_is_sent() -> None:
    backend, fast, _ = one_backend()
    x, residual, weight, *_ = fused_inputs().values()
    room = aligned(64)
    one, other = room[:32].view(4, 8), room[16:48].view(4, 8)
    for targets in ((one, one), (one, other)):
        for _ in range(2):
            with pytest.raises(ValueError, match="share memory"):
                backend.all_reduce_add_rms_norm(x, residual, weight, out=targets[0], residual_out=targets[1])
    assert not fast.calls


def test_a_parameter_reaches_the_hook_without_its_gradient() -> None:
    backend, fast, _ = one_backend()
    x = aligned(16).view(2, 8)
    weight = torch.nn.Parameter(aligned(8))
    normed, summed = backend.all_reduce_add_rms_norm(x, x.clone(), weight)
    assert not fast.calls[0][3].requires_grad
    assert not normed.requires_grad
    assert not summed.requires_grad


def test_eps_and_weight_offset_reach_the_backend() -> None:
    backend, fast, _ = one_backend()
    x, residual, weight, *_ = fused_inputs().values()
    for odd in (residual, torch.empty(8, 4).t().copy_(residual)):
        normed, _ = backend.all_reduce_add_rms_norm(x, odd, weight, 900.0, 0.5)
        assert torch.equal(normed, fallback.add_rms_norm(2 * x, residual, weight, 900.0, 0.5, None, None)[0])
    assert len(fast.calls) == 2


def test_a_hook_that_checks_operands_is_called_first_and_again_with_copies(who_looks: str) -> None:
    backend, fast, _ = one_backend()
    tensors = fused_inputs()
    x, residual, weight = tensors["x"], tensors["residual"], tensors["weight"]
    # The first call with a key finds its route where core validates its operands.
    backend.all_reduce_add_rms_norm(x, residual, weight)
    for targets in ({}, {"residual_out": residual}, {"out": tensors["new"], "residual_out": tensors["other"]}):
        fast.calls.clear()
        backend.all_reduce_add_rms_norm(x, residual, weight, **targets)
        assert fast.calls[0][1:4] == (x, residual, weight)
        assert fast.calls[0][-2:] == (targets.get("out"), targets.get("residual_out"))
        assert fast.declined == 0
    backend.all_reduce_add_rms_norm(x, aligned(64).view(4, 16)[:, ::2], weight)
    assert fast.declined == (who_looks == "native")


# Torch warns once a process of whoever asks such a tensor for its address.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_has_no_memory_is_refused_before_anything_is_sent() -> None:
    backend, fast, _ = one_backend()
    tensors = dict(itertools.islice(fused_inputs().items(), 3))
    backend.all_reduce_add_rms_norm(*tensors.values())
    fast.calls.clear()
    with FakeTensorMode():
        fakes = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
        views = {name: torch.empty(64)[16:][: tensor.numel()].view(tensor.shape) for name, tensor in tensors.items()}
    for name, fake in (*fakes.items(), *views.items()):
        with pytest.raises(TypeError, match="FakeTensor has no memory"):
            backend.all_reduce_add_rms_norm(*(tensors | {name: fake}).values())
    assert not fast.calls


def test_an_error_of_a_hook_that_checks_operands_names_the_backend(who_looks: str) -> None:
    backend, fast, _ = one_backend()
    x, weight = aligned(16).view(2, 8), aligned(8)
    backend.all_reduce_add_rms_norm(x, x.clone(), weight)
    fast.error = RuntimeError("illegal address")
    with pytest.raises(comm.CommError, match=r"'fast' of group .* failed in all_reduce_add_rms_norm: illegal address"):
        backend.all_reduce_add_rms_norm(x, x.clone(), weight)
    assert fast.declined == 0


def test_a_hook_that_implements_nothing_of_a_call_leaves_it_to_the_composition() -> None:
    asked = []

    def declines(*arguments: Any) -> Any:
        asked.append(arguments)
        return NotImplemented

    backend, fast, _ = one_backend(**{FUSED: declines})
    x, residual, weight, *_ = fused_inputs().values()
    for odd in (residual, torch.empty(8, 4).t().copy_(residual)):
        results = backend.all_reduce_add_rms_norm(x, odd, weight, 1e-5, 1.0)
        for result, due in zip(results, expected_norm(x, residual, weight), strict=True):
            assert torch.equal(result, due)
    assert len(fast.calls) == 2  # the sums of both compositions
    assert all(map(torch.Tensor.is_contiguous, asked[-1][1:4]))
