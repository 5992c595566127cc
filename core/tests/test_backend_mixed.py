"""Fused calls with inputs of two dtypes, or without a residual: core composes them, whoever serves the others."""

from __future__ import annotations

import itertools

import pytest
import torch
from comm_core._handle import fallback
from fake_handle import Fake, aligned, one_backend

HALVES = (torch.bfloat16, torch.float16)
#: The residual's dtype, None without one, and the weight's; "16" stands for the tensor's own.
KINDS = (("16", torch.float32), (torch.float32, "16"), (torch.float32, torch.float32), (None, "16"), (None, "float32"))


@pytest.fixture(params=["core", "native"], autouse=True)
def who_looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Core looks at every operand, or a backend whose native code does gets them first."""
    if request.param == "native":
        monkeypatch.setattr(Fake, "fit", staticmethod(request.getfixturevalue("native").fit))
    return str(request.param)


def inputs(
    dtype: torch.dtype, kind: tuple[object, object], shape: tuple[int, ...] = (4, 8)
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    residual_dtype, weight_dtype = (
        {"16": dtype, "float32": torch.float32}.get(each, each) if isinstance(each, str) else each for each in kind
    )
    numel = torch.Size(shape).numel()
    residual = None if residual_dtype is None else aligned(numel).view(shape).to(residual_dtype) / 7  # type: ignore[call-overload]
    weight = (aligned(shape[-1]) / 3).to(weight_dtype)  # type: ignore[call-overload]
    return aligned(numel, dtype).view(shape) / 3, residual, weight


def strided(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(*like.shape[:-1], 2 * like.shape[-1], dtype=like.dtype)[..., ::2]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_results_are_those_of_one_rounding_of_each(dtype: torch.dtype, kind: tuple[object, object]) -> None:
    backend, fast, _ = one_backend()
    x, residual, weight = inputs(dtype, kind)
    total, wide = (2 * x).float(), weight.float() + 1.0
    sums = total if residual is None else total + residual.float()
    expected = (sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + 1e-5) * wide).to(dtype)
    for _ in range(20):  # until the call's route is kept, and beyond
        y, s = backend.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 1.0)
        assert torch.equal(y, expected)
        assert s.dtype == (dtype if residual is None else residual.dtype)
        assert torch.equal(s, sums.to(s.dtype))
    assert not any(len(call) > 3 for call in fast.calls), "the fused hook was called"


def test_the_fused_hook_still_serves_the_other_calls() -> None:
    backend, fast, _ = one_backend()
    for kind in [("16", "16"), *KINDS, ("16", "16")] * 20:
        x, residual, weight = inputs(torch.bfloat16, kind)
        fast.calls.clear()
        y, _ = backend.all_reduce_add_rms_norm(x, residual, weight)
        assert torch.equal(y, fallback.add_rms_norm(2 * x, residual, weight, 1e-6, 0.0, None, None)[0])
        assert [len(call) > 3 for call in fast.calls] == [kind == ("16", "16")]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (2, 2, 8), (8,)], ids=str)
def test_results_go_where_they_are_asked_to(kind: tuple[object, object], shape: tuple[int, ...]) -> None:
    backend, _, _ = one_backend()
    for out_at, sum_at in itertools.product(("new", "strided", "x"), ("new", "strided", "residual")):
        x, residual, weight = inputs(torch.bfloat16, kind, shape)
        like = x if residual is None else residual
        y, s = backend.all_reduce_add_rms_norm(x, residual, weight)
        out = {"new": torch.empty_like(x), "strided": strided(x), "x": x}[out_at]
        into = {"new": torch.empty_like(like), "strided": strided(like), "residual": residual}[sum_at]
        if into is None:
            into = torch.empty_like(like)
        results = backend.all_reduce_add_rms_norm(x, residual, weight, out=out, residual_out=into)
        assert results[0] is out
        assert results[1] is into
        assert torch.equal(out, y)
        assert torch.equal(into, s)


def test_what_does_not_fit_is_refused() -> None:
    backend, fast, last = one_backend()
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16()
    for residual, gain in (
        (x.double(), weight),
        (x.half(), weight),
        (x, weight.double()),
        (None, weight.half()),
        (None, weight.int()),
    ):
        with pytest.raises(TypeError, match="one floating dtype"):
            backend.all_reduce_add_rms_norm(x, residual, gain)
    with pytest.raises(TypeError, match="one floating dtype"):
        backend.all_reduce_add_rms_norm(x.float(), x.float(), weight)
    with pytest.raises(ValueError, match="residual_out must have the dtype"):
        backend.all_reduce_add_rms_norm(x, x.float(), weight, residual_out=torch.empty_like(x))
    with pytest.raises(ValueError, match="residual_out must have the dtype"):
        backend.all_reduce_add_rms_norm(x, None, weight, residual_out=x.float())
    with pytest.raises(ValueError, match="expected tensor and residual"):
        backend.all_reduce_add_rms_norm(x, None, torch.ones(4).bfloat16())
    assert fast.calls == last.calls == []


def test_outputs_of_two_dtypes_that_share_a_byte_are_refused() -> None:
    backend, _, _ = one_backend()
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8)
    room = torch.empty(1024, dtype=torch.uint8)
    sums = room[:256].view(torch.float32).view(2, 32)[:, :16:2]
    upper = room[:256].view(torch.bfloat16)[1:].as_strided((2, 8), (64, 4))
    between = room[:256].view(torch.bfloat16)[2:].as_strided((2, 8), (64, 4))
    with pytest.raises(ValueError, match="share memory"):
        backend.all_reduce_add_rms_norm(x, x.float(), weight, out=upper, residual_out=sums)
    y, s = backend.all_reduce_add_rms_norm(x, x.float(), weight, out=between, residual_out=sums)
    assert torch.equal(s, torch.full((2, 8), 3.0))
    assert torch.equal(y, torch.ones(2, 8).bfloat16())
