"""A handle's fused calls with a quantised result, in one process: every form, by a hook and composed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comm_core._handle import fallback, quant
from comm_core.types import QUANTS, Range
from fake_handle import ALL_REDUCE, FUSED, QUANT, aligned, one_backend
from quant_reference import quantized

STATIC, PER_TOKEN, PER_GROUP = QUANTS
SHAPE = (5, 256)
#: By the quantising hook; by the fused hook; by the plain one.
SERVED = (Range(QUANT), Range(FUSED), Range(ALL_REDUCE))
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def inputs(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    numel = torch.Size(shape).numel()
    x, residual = (aligned(numel).view(shape) * factor for factor in (0.37, -0.9))
    x.view(-1, shape[-1])[0] *= 1e-12  # a row, and groups, below the least scale
    residual.view(-1, shape[-1])[0] *= 1e-12
    return [(each + 0).to(dtype) for each in (x, residual, aligned(shape[-1]) / 3)]


def given(form: str) -> dict[str, Any]:
    return {"quant": form} | ({"scale": torch.tensor([0.0073])} if form == STATIC else {})


def norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    rest = None if residual is None else residual.reshape(flat.shape)
    y, s = fallback.add_rms_norm(2 * flat, rest, weight, 1e-5, 1.0, None, None)
    return y.view(x.shape), s.view(x.shape)


def check(results: Results, expected: tuple[torch.Tensor, torch.Tensor], named: dict[str, Any]) -> None:
    q, scale, s, y = results
    due, scales = quantized(expected[0], named["quant"], named.get("scale"))
    assert q.dtype == torch.float8_e4m3fn
    assert torch.equal(q.view(torch.uint8), due.view(torch.uint8))
    assert torch.equal(scale, scales)
    assert torch.equal(s, expected[1])
    assert y is None or torch.equal(y, expected[0])


@pytest.mark.parametrize("served", SERVED, ids=lambda served: served.op)
@pytest.mark.parametrize("form", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_bits_are_those_of_the_norm_and_then_the_quantisation(served: Range, form: str, dtype: torch.dtype) -> None:
    backend, fast, _ = one_backend(served)
    x, residual, weight = inputs(dtype)
    expected = norm(x, residual, weight)
    for with_norm, column_major in itertools.product((False, True), (False, True)):
        for _ in range(2 if with_norm or column_major else 18):  # until the call's route is kept, and beyond
            results = backend.all_reduce_add_rms_norm_quant(
                x, residual, weight, 1e-5, 1.0, with_norm=with_norm, column_major_scales=column_major, **given(form)
            )
            check(results, expected, given(form))
            assert (results[3] is not None) is with_norm
        if form == PER_GROUP:
            assert results[1].stride() == ((1, 8) if column_major else (2, 1))
        elif form == PER_TOKEN:
            assert results[1].is_contiguous()
    assert (len(fast.calls[-1]) == 11) is (served.op == QUANT)
    counts = {(item.op, item.backend): item.calls for item in backend.stats()}
    assert counts[QUANT, "fast" if served.op == QUANT else "torch_distributed"] == 24


@pytest.mark.parametrize("served", SERVED[:2], ids=lambda served: served.op)
@pytest.mark.parametrize("form", QUANTS)
@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 128), (256,)], ids=str)
def test_results_go_where_they_are_asked_to(served: Range, form: str, shape: tuple[int, ...]) -> None:
    backend, _, _ = one_backend(served)

    def strided(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(*like.shape[:-1], 2 * like.shape[-1]).to(like.dtype)[..., ::2]

    def misaligned(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.numel() + 1).to(like.dtype)[1:].view(like.shape)

    x, residual, weight = inputs(shape=shape)
    expected = norm(x, residual, weight)
    for kind in (torch.empty_like, strided, misaligned):
        results = backend.all_reduce_add_rms_norm_quant(x, residual, weight, 1e-5, 1.0, with_norm=True, **given(form))
        outs = [kind(result) for result in results if result is not None]
        named = dict(zip(("out", "scale", "residual_out", "norm_out"), outs, strict=True)) | given(form)
        again = backend.all_reduce_add_rms_norm_quant(x, residual, weight, 1e-5, 1.0, **named)
        for result, name in zip(again, ("out", "scale", "residual_out", "norm_out"), strict=True):
            assert result is named[name]
        check(again, expected, given(form))
    again = backend.all_reduce_add_rms_norm_quant(
        x, residual, weight, 1e-5, 1.0, residual_out=residual, norm_out=x, **given(form)
    )
    assert again[2] is residual
    assert again[3] is x
    check(again, expected, given(form))


def test_outputs_may_lie_on_inputs() -> None:
    for form, name in itertools.product(QUANTS, ("out", "scale", "residual_out", "norm_out")):
        backend, _, _ = one_backend()
        x, residual, weight = inputs()
        expected = norm(x, residual, weight)
        place = {
            "out": x.view(torch.float8_e4m3fn).view(-1)[: x.numel()].view(x.shape),
            "scale": residual.view(-1)[: 5 * (1 if form == PER_TOKEN else 2)].view(5, -1),
            "residual_out": x,
            "norm_out": residual,
        }[name]
        if (form, name) == (STATIC, "scale"):
            continue
        results = backend.all_reduce_add_rms_norm_quant(x, residual, weight, 1e-5, 1.0, **given(form) | {name: place})
        assert any(result is place for result in results)
        check(results, expected, given(form))


@pytest.mark.parametrize("form", QUANTS)
def test_a_form_that_the_hook_declines_is_composed(form: str) -> None:
    backend, fast, _ = one_backend()
    fast.refused_forms = (form,)
    x, residual, weight = inputs()
    for each in QUANTS:
        fast.calls.clear()
        check(
            backend.all_reduce_add_rms_norm_quant(x, residual, weight, 1e-5, 1.0, **given(each)),
            norm(x, residual, weight),
            given(each),
        )
        assert [len(call) for call in fast.calls] == [8 if each == form else 11]
    counts = {(item.op, item.backend): item.calls for item in backend.stats()}
    assert counts == {(QUANT, "fast"): 2, (QUANT, "torch_distributed"): 1, (FUSED, "fast"): 1}


@pytest.mark.parametrize("form", QUANTS)
@pytest.mark.parametrize("kind", ["no residual", "residual", "weight"])
def test_inputs_of_two_dtypes_and_no_residual_are_composed(form: str, kind: str) -> None:
    backend, fast, _ = one_backend()
    x, residual, weight = inputs(torch.bfloat16)
    theirs = None if kind == "no residual" else residual.float() if kind == "residual" else residual
    weight = weight.float() if kind == "weight" else weight
    results = backend.all_reduce_add_rms_norm_quant(x, theirs, weight, 1e-5, 1.0, with_norm=True, **given(form))
    check(results, norm(x, theirs, weight), given(form))
    assert results[2].dtype == (torch.float32 if kind == "residual" else torch.bfloat16)
    assert [len(call) for call in fast.calls] == [3]


@pytest.mark.parametrize("form", QUANTS)
def test_special_values(form: str) -> None:
    normed = torch.zeros(4, 256)
    normed[0, :4] = torch.tensor([torch.nan, 1.0, -0.0, 1e-30])
    normed[1] = 1e30
    normed[1, 1] = -1e30
    normed[2, 200] = torch.nan
    scale = torch.full((1,), 0.01) if form == STATIC else quant.empty_scale(normed, form, False)
    q, _ = fallback_quantize(normed, form, scale)
    assert torch.equal(q.float().isnan(), normed.isnan())
    assert not scale.isnan().any()
    assert q.float()[1].abs().eq(448).all()
    assert q.view(torch.uint8)[0, 2] == 0x80
    assert q.view(torch.uint8)[3].eq(0).all()
    if form == PER_TOKEN:
        assert scale[3].item() == pytest.approx(1 / (448 * 512))
        assert scale[2].item() == pytest.approx(1 / (448 * 512))
    if form == PER_GROUP:
        assert scale[3, 0].item() == pytest.approx(1e-10 / 448)


def fallback_quantize(normed: torch.Tensor, form: str, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from comm_core.fallback import quantize

    return quantize(normed, form, scale)


def test_no_tokens() -> None:
    backend, fast, _ = one_backend()
    x, weight = torch.empty(0, 256), torch.ones(256)
    for form in QUANTS:
        q, scale, s, y = backend.all_reduce_add_rms_norm_quant(x, x, weight, with_norm=True, **given(form))
        assert q.shape == s.shape == (0, 256)
        assert y is not None
        assert y.shape == (0, 256)
        assert scale.shape == {STATIC: (1,), PER_TOKEN: (0, 1), PER_GROUP: (0, 2)}[form]
    assert [sent.numel() for _, sent, _ in fast.calls] == [1, 1, 1]


WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"quant": "fp4"}, ValueError, "quant='fp4' isn't one of fp8_static, fp8_per_token, fp8_per_group"),
    ({"quant": STATIC}, TypeError, "fp8_static needs scale"),
    ({"quant": STATIC, "scale": 0.5}, TypeError, "got float"),
    ({"quant": STATIC, "scale": torch.ones(2)}, ValueError, "float32 tensor of one element"),
    ({"quant": STATIC, "scale": torch.ones(1).double()}, ValueError, "float32 tensor of one element"),
    ({"quant": STATIC, "scale": torch.ones(1, device="meta")}, ValueError, "on meta"),
    ({"quant": PER_TOKEN, "scale": torch.ones(5)}, ValueError, r"as scale a tensor of torch.float32 \[5, 1\]"),
    ({"quant": PER_GROUP, "scale": torch.ones(5, 1)}, ValueError, r"as scale a tensor of torch.float32 \[5, 2\]"),
    ({"quant": PER_TOKEN, "scale": torch.ones(1).expand(5, 1)}, ValueError, "several elements at one address"),
    ({"quant": PER_TOKEN, "out": torch.empty(SHAPE)}, ValueError, "as out a tensor of torch.float8_e4m3fn"),
    ({"quant": PER_TOKEN, "out": 3}, TypeError, "torch.Tensor as out"),
    ({"quant": PER_TOKEN, "norm_out": torch.empty(5, 255)}, ValueError, "norm_out must have the dtype"),
    ({"quant": PER_TOKEN, "residual_out": torch.empty(5, 255)}, ValueError, "residual_out must have the dtype"),
)


@pytest.mark.parametrize(("named", "kind", "text"), WRONG, ids=[f"{n} {text}" for n, (*_, text) in enumerate(WRONG)])
def test_what_does_not_fit_is_refused(named: dict[str, Any], kind: type[Exception], text: str) -> None:
    backend, fast, last = one_backend()
    x, residual, weight = inputs()
    for shape in (SHAPE, (1, *SHAPE)):
        if len(shape) == 3 and not any(isinstance(named.get(key), str) for key in ("quant",)):
            continue
        with pytest.raises(kind, match=text if shape == SHAPE else None):
            backend.all_reduce_add_rms_norm_quant(x.view(shape), residual.view(shape), weight, **named)
    assert fast.calls == last.calls == []


def test_rows_that_groups_do_not_fill_are_refused() -> None:
    backend, fast, _ = one_backend()
    x = torch.ones(2, 200)
    with pytest.raises(ValueError, match="multiple of 128; got 200"):
        backend.all_reduce_add_rms_norm_quant(x, x, torch.ones(200), quant=PER_GROUP)
    assert fast.calls == []


@pytest.mark.parametrize("names", [*itertools.combinations(("out", "scale", "residual_out", "norm_out"), 2)], ids=str)
def test_outputs_that_share_memory_are_refused(names: tuple[str, str]) -> None:
    backend, fast, _ = one_backend()
    x, residual, weight = inputs()
    room = torch.empty(x.nbytes, dtype=torch.uint8)
    places = {
        "out": room[: x.numel()].view(torch.float8_e4m3fn).view(SHAPE),
        "scale": room[:20].view(torch.float32).view(5, 1),
        "residual_out": room.view(torch.float32).view(SHAPE),
        "norm_out": room.view(torch.float32).view(SHAPE),
    }
    with pytest.raises(ValueError, match="share memory"):
        backend.all_reduce_add_rms_norm_quant(
            x, residual, weight, quant=PER_TOKEN, **{name: places[name] for name in names}
        )
    assert fast.calls == []


def test_an_error_of_the_hook_names_the_backend_and_stops_the_handle() -> None:
    from comm_core import CommError

    backend, _, _ = one_backend(error=OSError("no link"))
    x, residual, weight = inputs()
    for text in ("backend 'fast' .* failed in all_reduce_add_rms_norm_quant: no link", "refuses further calls"):
        with pytest.raises(CommError, match=text):
            backend.all_reduce_add_rms_norm_quant(x, residual, weight, quant=PER_TOKEN)
