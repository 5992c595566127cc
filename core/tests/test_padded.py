"""Calls on padded batches in one process: which hook serves them with which session, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
from comm_core.types import QUANTS, Range
from fake_handle import ALL_REDUCE, FUSED, QUANT, Fake, aligned, one_backend

if TYPE_CHECKING:
    from comm_core._handle.backend import Backend

ROWS, HIDDEN = 4, 256


class Padded:
    """What a backend returns for a count, in place of its session."""

    def __init__(self, session: object, num_tokens: torch.Tensor) -> None:
        self.session = session
        self.num_tokens = num_tokens


def padded_backend(*ranges: Range, **hooks: Callable[..., Any]) -> tuple[Backend, Fake, Fake, list[Padded]]:
    made: list[Padded] = []

    def padded_session(session: object, num_tokens: torch.Tensor) -> Padded:
        made.append(Padded(session, num_tokens))
        return made[-1]

    return (*one_backend(*ranges, **{"padded_session": padded_session} | hooks), made)


def counts_of(bucket: int = ROWS) -> comm.TokenCounts:
    return comm.TokenCounts(bucket, 0, 2, "cpu")


#: Each operation as a call of two-dimensional tensors.
CALLS: dict[str, Callable[..., object]] = {
    ALL_REDUCE: lambda backend, x, **named: backend.all_reduce(x, **named),
    FUSED: lambda backend, x, **named: backend.all_reduce_add_rms_norm(x, x + 1, aligned(x.shape[-1]), **named),
    QUANT: lambda backend, x, **named: backend.all_reduce_add_rms_norm_quant(
        x, x + 1, aligned(x.shape[-1]), quant=QUANTS[1], **named
    ),
}


def rows(*shape: int) -> torch.Tensor:
    return aligned(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("shape", [(ROWS, HIDDEN), (2, 2, HIDDEN)])
@pytest.mark.parametrize("op", CALLS)
def test_hooks_get_what_reads_the_count_in_place_of_the_session(op: str, shape: tuple[int, ...]) -> None:
    backend, fast, _, made = padded_backend()
    counts, other = counts_of(), counts_of()
    x = rows(*shape)
    for _ in range(20):  # also once the route is kept
        CALLS[op](backend, x)
        CALLS[op](backend, x, num_tokens=counts)
        CALLS[op](backend, x, num_tokens=other)
    # Once for each count, which is the tensor that the caller fills.
    assert [each.num_tokens.data_ptr() for each in made] == [counts.total.data_ptr(), other.total.data_ptr()]
    assert all(each.session == "session of fast" for each in made)
    assert [call[0] for call in fast.calls] == ["session of fast", *made] * 20
    # As operators pass it.
    CALLS[op](backend, x, num_tokens=counts.total)
    assert fast.calls[-1][0] is made[0]
    assert len(made) == 2


@pytest.mark.parametrize("op", CALLS)
def test_results_are_those_of_all_rows(op: str) -> None:
    backend, *_ = padded_backend()
    plain = CALLS[op](backend, rows(ROWS, HIDDEN))
    padded = CALLS[op](backend, rows(ROWS, HIDDEN), num_tokens=counts_of())
    for one, other in zip(torch.utils._pytree.tree_leaves(plain), torch.utils._pytree.tree_leaves(padded), strict=True):
        assert one is other is None or torch.equal(one.float(), other.float())


def test_what_a_backend_composes_counts_in_its_all_reduce() -> None:
    for served in (Range(ALL_REDUCE), Range(FUSED)):
        backend, fast, last, made = padded_backend(served)
        CALLS[QUANT](backend, rows(ROWS, HIDDEN), num_tokens=counts_of())
        assert [call[0] for call in fast.calls] == made
        assert len(made) == 1
        assert not last.calls


def test_all_rows_are_summed_where_nobody_reads_the_count() -> None:
    def none(session: object, num_tokens: torch.Tensor) -> object:
        return NotImplemented

    for op, call in CALLS.items():
        declining, fast, *_ = padded_backend(padded_session=none)
        without, plain, _ = one_backend()
        uncovered, _, last, made = padded_backend(Range(ALL_REDUCE, dtypes=("float16",)))
        for backend in (declining, without, uncovered):
            call(backend, rows(ROWS, HIDDEN), num_tokens=counts_of())
        assert [each[0] for each in fast.calls + plain.calls] == ["session of fast"] * 2, op
        assert len(last.calls) == 1
        assert not made


@pytest.mark.parametrize("reads", [True, False])
def test_calls_that_leave_out_the_padding_count_as_exact_on_a_route_with_a_wire(reads: bool) -> None:
    def padded_session(session: object, num_tokens: torch.Tensor) -> object:
        return Padded(session, num_tokens) if reads else NotImplemented

    wire = Range(ALL_REDUCE, wire="fp8")
    backend, *_ = one_backend(Range(ALL_REDUCE), wire, wire="fp8", padded_session=padded_session)
    for _ in range(20):
        backend.all_reduce(rows(ROWS, HIDDEN), num_tokens=counts_of())
    backend.all_reduce(rows(ROWS, HIDDEN))
    found = {item.wire: item.calls for item in backend.stats()}
    assert found == ({"": 20, "fp8": 1} if reads else {"fp8": 21})


def test_complex_and_empty_tensors_are_summed_whole() -> None:
    backend, fast, _, made = padded_backend()
    x = torch.complex(rows(ROWS, HIDDEN), rows(ROWS, HIDDEN))
    assert torch.equal(backend.all_reduce(x, num_tokens=counts_of()), 2 * x)
    assert backend.all_reduce(torch.empty(0, HIDDEN), num_tokens=counts_of(0)).shape == (0, HIDDEN)
    assert not made
    assert fast.calls[0][0] == "session of fast"


@pytest.mark.parametrize("op", CALLS)
def test_counts_that_dont_fit_the_tensor(op: str) -> None:
    backend, fast, last, made = padded_backend()
    x = rows(ROWS, HIDDEN)
    wrong: list[tuple[object, type[Exception], str]] = [
        (counts_of(2), ValueError, r"bucket of 2, but the tensor has 4: expected comm_core.TokenCounts\(bucket=4, "),
        (3, TypeError, "num_tokens is of type int, .* pass a comm_core.TokenCounts"),
        (torch.zeros(1), TypeError, "num_tokens is torch.float32; kernels read int32"),
        (torch.zeros(2, dtype=torch.int32), ValueError, r"num_tokens is \[2\] on cpu; expected one element on cpu"),
        (
            comm.TokenCounts(ROWS, 0, 2, "meta"),
            ValueError,
            r"num_tokens is \[1\] on meta; .*TokenCounts\(..., device='cpu'\)",
        ),
    ]
    for num_tokens, error, text in wrong:
        with pytest.raises(error, match=text):
            CALLS[op](backend, x, num_tokens=num_tokens)
    assert not fast.calls + last.calls + made
    CALLS[op](backend, x, num_tokens=counts_of())  # the handle goes on


def test_a_hook_that_raises_stops_the_handle() -> None:
    def broken(session: object, num_tokens: torch.Tensor) -> object:
        raise RuntimeError("no such register")

    backend, fast, *_ = padded_backend(padded_session=broken)
    with pytest.raises(comm.CommError, match=r"backend 'fast' .* failed in padded_session: no such register"):
        backend.all_reduce(rows(ROWS, HIDDEN), num_tokens=counts_of())
    with pytest.raises(comm.CommError, match="no such register"):
        backend.all_reduce(rows(ROWS, HIDDEN))
    assert not fast.calls


def test_a_closed_session_keeps_no_count() -> None:
    backend, _, _, made = padded_backend()
    (session,) = backend._serving.all_sessions
    for _ in range(2):
        total = torch.tensor([3], dtype=torch.int32)
        backend.all_reduce(rows(ROWS, HIDDEN), num_tokens=total)
        del total  # its address isn't given to another tensor
    assert len({each.num_tokens.data_ptr() for each in made}) == len(made) == 2
    assert len(session._padded_values) == 2
    session.close(orderly=True)
    assert not session._padded_values
