"""What surrounds the one kernel of the composed operation; where Triton is installed, also its arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comm_core import CaptureError
from comm_core._handle import fallback, norm

CPU = torch.device("cpu")
SHAPE = (4, 16)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CPU.index)


@pytest.fixture
def calls() -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """The tensors that a stand-in for the kernel was launched with; it refuses what the kernel would misread."""
    seen = []

    def launch(num_tokens: int, *arguments: Any) -> None:
        tensors, (eps, offset) = arguments[:5], arguments[5:]
        assert all(tensor.is_contiguous() and not tensor.data_ptr() % 16 for tensor in tensors)
        assert num_tokens == len(tensors[0])
        results = fallback._torch_add_rms_norm(*tensors[:3], eps, offset, None, None)
        for target, result in zip(tensors[3:], results, strict=True):
            target.copy_(result)
        seen.append(tensors)

    norm._kernels[CPU, torch.bfloat16, SHAPE[1], torch.bfloat16, torch.bfloat16] = launch
    yield seen
    assert seen


def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(size, generator=generator).bfloat16() for size in (SHAPE, SHAPE, SHAPE[1:]))  # type: ignore[return-value]


def call(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    results = norm.add_rms_norm(*args)
    assert results is not None
    return results


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = whole[1:].view(tensor.shape)
    assert view.data_ptr() % 16
    return view.copy_(tensor)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def test_new_results_leave_the_inputs_alone(calls: list[tuple[torch.Tensor, ...]]) -> None:
    inputs = arguments()
    kept = [tensor.clone() for tensor in inputs]
    y, s = call(*inputs, 1e-6, 1.0, None, None)
    expected = fallback._torch_add_rms_norm(*inputs, 1e-6, 1.0, None, None)
    assert torch.equal(y, expected[0])
    assert torch.equal(s, expected[1])
    assert all(map(torch.equal, inputs, kept))
    assert calls[0][:3] == inputs


@pytest.mark.parametrize("odd", [misaligned, strided])
@pytest.mark.parametrize("index", range(3))
def test_odd_inputs_are_staged(calls: list[tuple[torch.Tensor, ...]], odd: Any, index: int) -> None:
    inputs = list(arguments())
    expected = fallback._torch_add_rms_norm(*inputs, 1e-6, 0.0, None, None)
    inputs[index] = odd(inputs[index]).requires_grad_()
    y, s = call(*inputs, 1e-6, 0.0, None, None)
    assert torch.equal(y, expected[0])
    assert torch.equal(s, expected[1])
    assert not y.requires_grad


def test_results_go_over_the_inputs_without_a_copy(calls: list[tuple[torch.Tensor, ...]]) -> None:
    expected = fallback._torch_add_rms_norm(*arguments(), 1e-6, 0.0, None, None)
    for swapped in (False, True):
        x, r, w = arguments()
        out, residual_out = (r, x) if swapped else (x, r)
        y, s = call(x, r, w, 1e-6, 0.0, out, residual_out)
        assert y is out
        assert s is residual_out
        assert calls[-1][3] is out
        assert calls[-1][4] is residual_out
        assert torch.equal(y, expected[0])
        assert torch.equal(s, expected[1])


@pytest.mark.parametrize("where", ["misaligned", "strided", "one row on", "over the weight", "over residual_out"])
def test_results_go_also_where_the_kernel_cant_write(calls: list[tuple[torch.Tensor, ...]], where: str) -> None:
    x, r, w = arguments()
    expected = fallback._torch_add_rms_norm(x, r, w, 1e-6, 0.0, None, None)
    residual_out = torch.empty_like(x)
    if where == "one row on":
        whole = torch.empty(5, SHAPE[1], dtype=x.dtype)
        x, out = whole[:4].copy_(x), whole[1:]
    elif where == "over the weight":
        out = torch.empty_like(x)
        w = out[2].copy_(w)
    else:
        out = {"misaligned": misaligned, "strided": strided}.get(where, lambda _: residual_out)(x)
    y, s = call(x, r, w, 1e-6, 0.0, out, residual_out)
    assert y is out
    assert s is residual_out
    assert calls[-1][3] is not out or calls[-1][4] is not residual_out
    assert where == "over residual_out" or torch.equal(y, expected[0])
    assert torch.equal(s, expected[1])


def test_what_it_has_no_kernel_for_is_left_to_torch(calls: list[tuple[torch.Tensor, ...]]) -> None:
    x, r, w = arguments()
    assert norm.add_rms_norm(*(tensor.double() for tensor in (x, r, w)), 1e-6, 0.0, None, None) is None
    assert norm.add_rms_norm(x[:0], r[:0], w, 1e-6, 0.0, None, None) is None
    assert norm.add_rms_norm(x, r.to("meta"), w, 1e-6, 0.0, None, None) is None
    assert "float64" in norm.prepare(torch.device("cuda", 0), torch.float64, 16)
    assert "on cpu" in norm.prepare(CPU, torch.float32, 16)
    call(x, r, w, 1e-6, 0.0, None, None)


def test_nothing_is_compiled_while_a_stream_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(norm, "_compile", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert norm.add_rms_norm(*arguments(), 1e-6, 0.0, None, None) is None
    with pytest.raises(
        CaptureError, match=r"torch.bfloat16 rows of 16 on cuda:3 can't be compiled.*Call comm.pre_capture_init"
    ):
        norm.prepare(torch.device("cuda", 3), torch.bfloat16, 16)


def test_what_was_prepared_serves_a_capture_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(norm, "_compile", lambda *key: compiled.append(key) or (lambda *_: None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in (torch.device("cuda"), torch.device("cuda", 3)):
        assert norm.prepare(device, torch.bfloat16, 16) == ""
    assert compiled == [(torch.device("cuda", 3), torch.bfloat16, 16, torch.bfloat16, torch.bfloat16)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert norm.prepare(torch.device("cuda", 3), torch.bfloat16, 16) == ""


def test_where_triton_fails_torch_serves_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As where it isn't installed.
    monkeypatch.setitem(sys.modules, "comm_core._handle.norm_triton", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    devices = [torch.device("cuda", index) for index in (0, 1)]
    reasons = {norm.prepare(device, dtype, 16) for device in devices for dtype in (torch.float16, torch.float32)}
    assert len(reasons) == 1
    assert "Triton can't be used: ModuleNotFoundError" in reasons.pop()
    assert caplog.text.count("the composed norm runs as several torch kernels") == 1
    norm._kernels[CPU, torch.bfloat16, 16, torch.bfloat16, torch.bfloat16] = "it failed before"
    assert norm.add_rms_norm(*arguments(), 1e-6, 0.0, None, None) is None


def test_the_kernels_arithmetic_is_that_of_torchs_kernels() -> None:
    pytest.importorskip("triton", reason="Triton isn't installed: its interpreter would run the kernel here")
    # Triton looks at the variable when it is imported, which may have happened here.
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("interpreted_norm.py")
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "96 cases\n"), done.stderr
