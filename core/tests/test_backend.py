from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from comm_core._plan.routes import Offer
from comm_core.types import DTYPES, TERMINAL, Range
from fake_handle import ALL_REDUCE, FUSED, Fake, aligned, handle, one_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import Message, offers, serves
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

# Routing


@settings(deadline=None, max_examples=150)
@given(offers(largest=512), st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.integers(1, 600)), max_size=20))
def test_each_size_goes_to_the_backend_of_its_route(made: tuple[Offer, ...], sizes: list[tuple[str, int]]) -> None:
    fakes = {name: Fake() for name in (*"abcdefgh", TERMINAL)}
    backend = handle(made, fakes)
    for dtype, numel in sizes:
        x = aligned(numel, getattr(torch, dtype))
        message = Message(ALL_REDUCE, "eager", "cpu", dtype, x.nbytes)
        expected = serves(made, message)
        assert backend.decision.route(ALL_REDUCE, "eager", "cpu", dtype).backend_for(x.nbytes) == expected
        assert torch.equal(backend.all_reduce(x), x + x)
        assert [name for name, fake in fakes.items() if fake.calls] == [expected]
        assert fakes[expected].calls.pop()[0] == (
            "the process group" if expected == TERMINAL else f"session of {expected}"
        )


def test_the_edges_of_four_ranges_are_where_the_next_backend_begins() -> None:
    edges = {"a": 64, "b": 256, "c": 1024, "d": 4096}
    made = [Offer(n, 300, (Range(ALL_REDUCE, max_nbytes=edge, multiple_nbytes=4),)) for n, edge in edges.items()]
    fakes = {name: Fake() for name in (*edges, TERMINAL)}
    backend = handle(made, fakes)
    assert backend.name == "a"
    served = {}
    for edge in edges.values():
        for numel in (edge // 2 - 1, edge // 2, edge // 2 + 1):
            backend.all_reduce(aligned(numel, torch.bfloat16))
            (served[numel * 2],) = [name for name, fake in fakes.items() if fake.calls and fake.calls.pop()]
    assert served == {edge + off: TERMINAL if off else name for name, edge in edges.items() for off in (-2, 0, 2)}


def test_another_plan_serves_what_the_one_before_has_served() -> None:
    fakes = {name: Fake() for name in ("a", "b", TERMINAL)}
    backend = handle([Offer("a", 300, (Range(ALL_REDUCE), Range(FUSED)))], fakes)
    other = handle([Offer("b", 300, (Range(ALL_REDUCE), Range(FUSED)))], fakes)
    x = aligned(16).view(2, 8)

    def served() -> list[str]:
        for _ in range(2):
            backend.all_reduce(x)
            backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8))
        calls = {name: len(fake.calls) for name, fake in fakes.items() if fake.calls}
        for fake in fakes.values():
            fake.calls.clear()
        assert set(calls.values()) == {4}
        return list(calls)

    assert served() == ["a"]
    backend._serving.adopt(other.decision, other._serving.sessions)
    assert served() == ["b"]
    backend._serving.use_graph_routes(True)
    assert served() == ["b"]


def test_the_name_is_that_of_the_smallest_eager_float_message() -> None:
    assert one_backend(Range(ALL_REDUCE, min_nbytes=5))[0].name == TERMINAL
    assert one_backend(Range(ALL_REDUCE, max_nbytes=4))[0].name == "fast"
    assert one_backend(Range(ALL_REDUCE, dtypes=("bfloat16",)))[0].name == TERMINAL


# Where the result goes


def test_without_out_the_result_is_new_and_the_tensor_is_left_alone() -> None:
    backend, fast, _ = one_backend()
    x = aligned(32)
    result = backend.all_reduce(x)
    assert torch.equal(result, 2 * aligned(32))
    assert torch.equal(x, aligned(32))
    assert fast.calls == [("session of fast", x, None)]


def test_in_place_and_into_another_tensor_go_to_the_hook_as_they_are() -> None:
    backend, fast, _ = one_backend()
    x, out = aligned(32), aligned(32)
    assert backend.all_reduce(x, out) is out
    assert backend.all_reduce(x, x) is x
    assert torch.equal(out, x)
    assert [call[2] for call in fast.calls] == [out, x]
    assert fast.calls[0][2] is out
    assert fast.calls[1][2] is fast.calls[1][1] is x


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: aligned(32).view(4, 8).t(),
    "every other": lambda: aligned(64)[::2].view(32),
    "misaligned": lambda: aligned(32, offset=1),
    "a row further on": lambda: aligned(33)[1:],
    "expanded": lambda: aligned(1).expand(32),
    "of one element, misaligned": lambda: aligned(1, offset=3),
    "channels last": lambda: aligned(32).view(1, 2, 4, 4).to(memory_format=torch.channels_last),
    "no dimension": lambda: aligned(1, offset=1)[0],
}


@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_hooks_cannot_take_is_staged_and_keeps_its_route(kind: str) -> None:
    backend, fast, last = one_backend(Range(ALL_REDUCE, max_nbytes=128))
    x = ODD[kind]()
    expected = 2 * x.clone()
    assert torch.equal(backend.all_reduce(x), expected)
    out = torch.zeros(x.shape)
    assert backend.all_reduce(x, out) is out
    assert torch.equal(out, expected)
    if kind != "expanded":
        assert backend.all_reduce(x, x) is x
        assert torch.equal(x, expected)
    assert len(fast.calls) == (2 if kind == "expanded" else 3)
    assert not last.calls


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "expanded"])
def test_an_out_that_hooks_cannot_take_is_staged(kind: str) -> None:
    backend, fast, _ = one_backend()
    out = ODD[kind]()
    x = aligned(out.numel()).view(out.shape)
    assert backend.all_reduce(x, out) is out
    assert torch.equal(out, 2 * x)
    assert torch.equal(x, aligned(out.numel()).view(out.shape))
    assert len(fast.calls) == 1


@pytest.mark.parametrize("shift", [-28, -4, 0, 4, 28])
def test_an_out_that_overlaps_is_staged(shift: int) -> None:
    backend, fast, _ = one_backend()
    room = aligned(96)
    x, out = room[32:64], room[32 + shift : 64 + shift]
    expected = 2 * x.clone()
    assert backend.all_reduce(x, out) is out
    assert torch.equal(out, expected)
    assert fast.calls[0][2] is None


@pytest.mark.parametrize("shift", [-32, 32])
def test_an_out_next_to_the_tensor_is_used_directly(shift: int) -> None:
    backend, fast, _ = one_backend()
    room = aligned(96)
    x, out = room[32:64], room[32 + shift : 64 + shift]
    assert torch.equal(backend.all_reduce(x, out), 2 * x)
    assert fast.calls[0][2] is out


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.complex64])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 8)])
def test_an_empty_tensor_takes_its_turn_as_one_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    backend, fast, last = one_backend()
    x, out = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    result = backend.all_reduce(x)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    assert backend.all_reduce(x, out) is out
    assert backend.all_reduce(x, x) is x
    assert [sent.numel() for _, sent, _ in fast.calls] == [1] * 3
    assert not last.calls
    with pytest.raises(ValueError, match="out is"):
        backend.all_reduce(x, torch.empty(7, dtype=dtype))
    assert len(fast.calls) == 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors_travel_as_pairs_of_floats(dtype: torch.dtype) -> None:
    backend, fast, _ = one_backend()
    for x in (
        torch.randn(6, dtype=dtype),
        torch.randn(4, 6, dtype=dtype).t(),
        torch.randn(6, dtype=dtype).conj(),
        torch.randn(7, dtype=dtype)[1:],
        torch.randn((), dtype=dtype),
    ):
        expected = 2 * x.resolve_conj().clone()
        result, out = backend.all_reduce(x), torch.empty_like(expected)
        assert (result.shape, result.dtype, result.is_conj()) == (x.shape, dtype, False)
        assert torch.equal(result, expected)
        assert backend.all_reduce(x, out) is out
        assert torch.equal(out, expected)
        assert backend.all_reduce(x, x) is x
        assert torch.equal(x, expected)
    assert {call[1].dtype for call in fast.calls} == {dtype.to_real()}


def test_a_real_view_with_a_pending_negation_is_resolved() -> None:
    backend, _, _ = one_backend()
    x = torch.tensor([1 + 2j]).conj().imag
    assert x.is_neg()
    assert backend.all_reduce(x).tolist() == [-4.0]


# Refusals


def without_warning(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def given_back() -> torch.Tensor:
    """A tensor whose memory is let go of between its uses, as sharded parameters' is."""
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: torch.eye(4).to_sparse(), TypeError, "torch.sparse_coo"),
        (lambda: torch.eye(4).to_sparse_csr(), TypeError, "torch.sparse_csr"),
        (lambda: torch.eye(4, dtype=torch.complex64).to_sparse(), TypeError, "torch.sparse_coo"),
        (lambda: torch.ones(4, device="meta"), ValueError, "a tensor on meta can't be reduced in group 'tp'"),
        (lambda: torch.ones(4, device="meta", dtype=torch.complex64), ValueError, "which serves tensors on cpu"),
        # Torch gives it an address, 16, like one that kernels take.
        (lambda: torch.ones(8, device="meta")[4:], ValueError, "a tensor on meta can't be reduced in group 'tp'"),
        (given_back, TypeError, "this Tensor has no memory"),
        (lambda: TwoTensor(torch.ones(4), torch.ones(4)), TypeError, "this TwoTensor has no memory"),
        # Its address is 16, so far behind 0.
        (lambda: TwoTensor(torch.ones(8), torch.ones(8))[4:], TypeError, "this TwoTensor has no memory"),
    ],
)
def test_what_no_backend_takes_is_refused_before_anything_is_sent(
    make: Callable[[], torch.Tensor], kind: type[Exception], words: str
) -> None:
    backend, fast, last = one_backend()
    x = without_warning(make)
    # Also after messages of the same device, dtype and size.
    for numel in (0, 4, 16):
        if numel:
            backend.all_reduce(torch.ones(numel))
            fast.calls.clear()
        for out in (None, x):
            with pytest.raises(kind) as raised:
                backend.all_reduce(x, out)
            assert words in str(raised.value)
        assert not fast.calls
        assert not last.calls


@pytest.mark.parametrize(
    "x", [torch.ones(4), torch.ones(9)[1:5], torch.ones(8)[::2], torch.ones(4, dtype=torch.cfloat)]
)
@pytest.mark.parametrize(
    "out",
    [
        torch.ones(5),
        torch.ones(2, 2),
        torch.ones(4, dtype=torch.float64),
        torch.ones(4, device="meta"),
        torch.ones(4).to_sparse(),
    ],
)
def test_an_out_that_is_not_like_the_tensor_is_refused(x: torch.Tensor, out: torch.Tensor) -> None:
    backend, fast, _ = one_backend()
    with pytest.raises(ValueError, match="out is"):
        backend.all_reduce(x, out)
    assert not fast.calls


@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(8)[::2]])
def test_an_out_of_which_several_elements_are_one_is_refused(x: torch.Tensor) -> None:
    backend, fast, _ = one_backend()
    with pytest.raises(ValueError, match="several elements at one address"):
        backend.all_reduce(x, torch.zeros(1).expand(4))
    assert not fast.calls
    one = torch.zeros(1).expand(1)
    assert backend.all_reduce(x[:1], one) is one


@pytest.mark.parametrize("out", [torch.zeros(8)[::2], torch.zeros(5)[1:]])
def test_a_parameter_that_is_staged_takes_the_sum(out: torch.Tensor) -> None:
    backend, _, _ = one_backend()
    parameter = torch.nn.Parameter(out)
    assert backend.all_reduce(torch.ones(4), parameter) is parameter
    assert torch.equal(parameter, torch.full((4,), 2.0))
    assert parameter.is_leaf


def test_a_tensor_that_is_waited_for_is_summed() -> None:
    # What torch's functional collectives return: a wrapper without an address.
    backend, fast, _ = one_backend()
    x, out = (AsyncCollectiveTensor(torch.full((4,), float(value))) for value in (1, 0))
    assert torch.equal(backend.all_reduce(x), torch.full((4,), 2.0))
    assert backend.all_reduce(torch.ones(4), out) is out
    assert torch.equal(out, torch.full((4,), 2.0))
    assert len(fast.calls) == 2


def test_a_view_of_a_tensor_that_is_waited_for_is_summed() -> None:
    # Its address is so far behind 0 as it begins behind the other's.
    backend, fast, _ = one_backend()
    x, out = (AsyncCollectiveTensor(aligned(32, offset=offset))[16:] for offset in (0, 1))
    assert isinstance(x, AsyncCollectiveTensor)
    assert x.data_ptr() == 64
    due = torch.arange(17, 33) * 2.0
    assert torch.equal(backend.all_reduce(x), due)
    assert backend.all_reduce(torch.ones(16), out) is out
    assert torch.equal(out, torch.full((16,), 2.0))
    assert len(fast.calls) == 2


class Named(torch.Tensor):
    """A subclass that wraps nothing, as weights of many libraries are."""


@pytest.mark.parametrize("offset", [0, 1])
def test_a_subclass_with_memory_of_its_own_reaches_the_hook(offset: int) -> None:
    backend, fast, _ = one_backend()
    x = aligned(16, offset=offset).as_subclass(Named)
    due = x.as_subclass(torch.Tensor) * 2
    assert torch.equal(backend.all_reduce(x).as_subclass(torch.Tensor), due)
    assert (fast.calls[0][1].data_ptr() == x.data_ptr()) == (offset == 0)
    assert type(fast.calls[0][1]) is torch.Tensor
    assert backend.all_reduce(x, x) is x
    assert torch.equal(x.as_subclass(torch.Tensor), due)
