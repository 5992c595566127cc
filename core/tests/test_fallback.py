from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
import torch
import torch.distributed as dist
from comm_core._handle import fallback
from comm_core.errors import CaptureError
from comm_core.types import DTYPES
from torch._C._distributed_c10d import HashStore

FLOATS = [getattr(torch, name) for name in DTYPES if "float" in name]


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def arguments(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in (shape, shape, shape[-1:]))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (17, 96), (2, 4096)])
@pytest.mark.parametrize(("eps", "offset"), [(1e-6, 0.0), (0.25, 0.0), (1e-5, 1.0)])
def test_the_norm_is_that_of_fp64_but_for_one_rounding(
    dtype: torch.dtype, shape: tuple[int, int], eps: float, offset: float
) -> None:
    x, residual, weight = arguments(dtype, *shape)
    y, s = fallback.add_rms_norm(x, residual, weight, eps, offset, None, None)
    sums = x.double() + residual.double()
    scale = 1 / (sums.pow(2).sum(-1, keepdim=True) / shape[1] + eps).sqrt()
    norm = sums * scale * (weight.double() + offset)
    # Half a unit in the last place, beside fp32's own error where the arithmetic is fp32.
    unit = torch.finfo(dtype).eps / 2 + (torch.finfo(torch.float32).eps * 4 if dtype is not torch.float64 else 1e-15)
    tiny = torch.finfo(dtype).smallest_normal
    assert (y.dtype, s.dtype, y.shape, s.shape) == (dtype, dtype, x.shape, x.shape)
    torch.testing.assert_close(s.double(), sums, rtol=unit, atol=tiny)
    torch.testing.assert_close(y.double(), norm, rtol=unit, atol=max(tiny, 1e-7 if dtype is not torch.float64 else 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_takes_the_sum_before_it_is_rounded(dtype: torch.dtype) -> None:
    """A norm of the rounded sum, as of an add in the dtype, is further away."""
    x, residual, weight = arguments(dtype, 64, 1024)
    y, s = fallback.add_rms_norm(x, residual, weight, 1e-6, 0.0, None, None)

    def norm(sums: torch.Tensor) -> torch.Tensor:
        return sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + 1e-6) * weight.double()

    exact, rounded = norm(x.double() + residual.double()), norm(s.double())
    assert (y.double() - exact).abs().mean() < (y.double() - rounded).abs().mean()


def test_results_go_where_they_are_asked_to_also_over_the_inputs() -> None:
    x, residual, weight = arguments(torch.float32, 4, 16)
    y, s = fallback.add_rms_norm(x, residual, weight, 1e-6, 0.0, None, None)
    for out, residual_out in ((x, residual), (residual, x), (torch.empty(4, 16), torch.empty(16, 4).t())):
        copies = {id(x): x.clone(), id(residual): residual.clone()}
        inputs = (copies[id(x)], copies[id(residual)])
        target, residual_target = copies.get(id(out), out), copies.get(id(residual_out), residual_out)
        results = fallback.add_rms_norm(*inputs, weight, 1e-6, 0.0, target, residual_target)
        assert results[0] is target
        assert results[1] is residual_target
        assert torch.equal(target, y)
        assert torch.equal(residual_target, s)


def test_nothing_is_differentiated() -> None:
    x, residual, weight = (tensor.requires_grad_() for tensor in arguments(torch.float32, 4, 16))
    results = fallback.add_rms_norm(x, residual, weight, 1e-6, 0.0, None, None)
    assert not any(result.requires_grad for result in (*results, fallback.single_rank_all_reduce(None, x, None)))


def test_a_group_of_one_gets_a_copy() -> None:
    x = torch.arange(6.0)
    assert torch.equal(copy := fallback.single_rank_all_reduce(None, x, None), x)
    assert copy.data_ptr() != x.data_ptr()
    assert fallback.single_rank_all_reduce(None, x, x) is x
    out = torch.empty(6)
    assert fallback.single_rank_all_reduce(None, x, out) is out
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_sums_every_dtype(group_of_one: dist.ProcessGroup, dtype: str) -> None:
    x = torch.arange(40).to(getattr(torch, dtype))
    for out in (None, x.clone(), x):
        result = fallback.torch_distributed(group_of_one, x, out)
        assert result.dtype == x.dtype
        assert result is out or out is None
        assert torch.equal(result, torch.arange(40).to(x.dtype))
    assert fallback.torch_distributed(group_of_one, x, None).data_ptr() != x.data_ptr()


def test_the_first_cuda_call_of_a_group_isnt_captured(
    group_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu:
        is_cuda = True

    reduced: list[object] = []
    monkeypatch.setattr(fallback, "torch_distributed", lambda _group, tensor, _out: reduced.append(tensor))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    terminal = fallback.TerminalFallback(group_of_one, "group 'tp'")
    on_gpu = cast("torch.Tensor", OnGpu())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError, match=r"no communicator for group 'tp' yet.*Call comm.pre_capture_init"):
        terminal.all_reduce(on_gpu, None)
    terminal.all_reduce(torch.ones(1), None)
    assert len(reduced) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    terminal.all_reduce(on_gpu, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    terminal.all_reduce(on_gpu, None)
    assert reduced[1:] == [on_gpu, on_gpu]
