"""The kernel of the composed operation on a GPU: right, in place, recorded, never compiled while a stream captures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comm_core import CaptureError
from comm_core._handle import fallback, norm

pytestmark = pytest.mark.gpus(1)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows around a program's elements, with and without a remainder; the last two go in several rounds.
SHAPES = ((1, 1), (3, 8), (17, 96), (1, 2880), (33, 4096), (128, 5120), (512, 7168), (3, 4095), (2, 16392), (2, 40000))


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(norm, "_kernels", {})
    with torch.cuda.device(0):
        yield
    torch.cuda.synchronize()


def arguments(dtype: torch.dtype, shape: tuple[int, int], device: Any = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(sum(shape))
    sizes = (shape, shape, shape[1:])
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def check(y: torch.Tensor, s: torch.Tensor, inputs: list[torch.Tensor], eps: float, offset: float) -> None:
    x, residual, weight = (tensor.double() for tensor in inputs)
    sums = x + residual
    exact = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + eps) * (weight + offset)
    # Half a unit in the last place, beside fp32's own error.
    unit = torch.finfo(y.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    tiny = max(torch.finfo(y.dtype).smallest_normal, 1e-7)
    torch.testing.assert_close(s.double(), sums, rtol=unit, atol=tiny)
    torch.testing.assert_close(y.double(), exact, rtol=unit, atol=tiny)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_norm_of_fp64_but_for_one_rounding(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for eps, offset in ((1e-6, 0.0), (0.25, 1.0)):
        inputs = arguments(dtype, shape)
        copies = [tensor.clone() for tensor in inputs]
        y, s = fallback.add_rms_norm(*inputs, eps, offset, None, None)
        assert all(map(torch.equal, inputs, copies))
        check(y, s, inputs, eps, offset)
        for out, residual_out in ((0, 1), (1, 0)):
            again = [tensor.clone() for tensor in inputs]
            results = fallback.add_rms_norm(*again, eps, offset, again[out], again[residual_out])
            assert results[0] is again[out]
            assert torch.equal(again[out], y)
            assert torch.equal(again[residual_out], s)
    assert all(callable(kernel) for kernel in norm._kernels.values())
    assert len(norm._kernels) == 1


def test_what_the_kernel_cant_take_gives_the_same_bits() -> None:
    inputs = arguments(torch.bfloat16, (33, 4096))
    expected = fallback.add_rms_norm(*inputs, 1e-6, 0.0, None, None)
    for index in range(3):
        odd = list(inputs)
        whole = torch.empty(odd[index].numel() + 1, device="cuda", dtype=torch.bfloat16)
        odd[index] = whole[1:].view(odd[index].shape).copy_(odd[index])
        out = torch.empty(4096, 33, device="cuda", dtype=torch.bfloat16).t()
        results = fallback.add_rms_norm(*odd, 1e-6, 0.0, out, None)
        assert results[0] is out
        assert all(map(torch.equal, results, expected))


def test_a_prepared_kernel_is_recorded_without_a_call_before() -> None:
    assert norm.prepare(torch.device("cuda"), torch.bfloat16, 4096) == ""
    inputs = arguments(torch.bfloat16, (8, 4096))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, s = fallback.add_rms_norm(*inputs, 1e-6, 0.0, None, None)
    for salt in range(3):
        for static, fresh in zip(inputs[:2], arguments(torch.bfloat16, (8, 4096 + salt)), strict=False):
            static.copy_(fresh[:, :4096])
        graph.replay()
        check(y, s, inputs, 1e-6, 0.0)


def test_an_unprepared_capture_records_torchs_kernels() -> None:
    inputs = arguments(torch.bfloat16, (8, 4096))
    fallback._torch_add_rms_norm(*inputs, 1e-6, 0.0, None, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, s = fallback.add_rms_norm(*inputs, 1e-6, 0.0, None, None)
        with pytest.raises(CaptureError, match="before"):
            norm.prepare(torch.device("cuda"), torch.bfloat16, 4096)
    graph.replay()
    check(y, s, inputs, 1e-6, 0.0)
    assert not norm._kernels


@pytest.mark.gpus(2)
def test_tensors_of_a_device_that_isnt_current() -> None:
    for index, dtype in itertools.product((1, 0), DTYPES[:2]):
        inputs = arguments(dtype, (8, 2880), torch.device("cuda", index))
        y, s = fallback.add_rms_norm(*inputs, 1e-6, 0.0, None, None)
        assert y.device == inputs[0].device
        check(y, s, inputs, 1e-6, 0.0)
    assert torch.cuda.current_device() == 0
    inputs[2] = inputs[2].to("cuda:1")
    with pytest.raises(RuntimeError, match="device"):
        fallback.add_rms_norm(*inputs, 1e-6, 0.0, None, None)


def test_torch_and_the_kernel_agree_to_a_unit() -> None:
    inputs = arguments(torch.bfloat16, (64, 7168))
    ours = fallback.add_rms_norm(*inputs, 1e-6, 1.0, None, None)
    theirs = fallback._torch_add_rms_norm(*inputs, 1e-6, 1.0, None, None)
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0] != theirs[0]).float().mean() < 1e-3
