"""The residual's add and the RMSNorm in a kernel, for CUDA tensors where Triton is there; see `comm_core.fallback`.

FlashInfer's `fused_add_rmsnorm` rounds as this does, but works in place alone, in half precisions, with a weight's
offset of 0 or 1: it would need copies elsewhere. `benchmarks/add_rms_norm.py` times both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from comm_core._control.deadline import describe
from comm_core._control.guard import raise_if_capturing
from comm_core._handle.operands import delivered, disjoint, plain, plain_copy

__all__ = ["add_rms_norm", "prepare"]

_log = logging.getLogger("comm_core")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Key = tuple[torch.device, torch.dtype, int]
# (num_tokens, tensor, residual, weight, normed, summed, eps, weight_offset); a text says why there is none.
_Launch = Callable[..., None]
_kernels: dict[_Key, _Launch | str] = {}
_lock = threading.Lock()


def prepare(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str:
    """Compile the kernel for rows of `hidden_size` elements of `dtype`, once a process. Local.

    A call compiles by itself where that wasn't done, but not while a stream captures: that records torch's own kernels,
    which are slower.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        hidden_size: elements a row.

    Returns:
        "" where it is ready; else why torch's own kernels are used, one sentence without a full stop.

    Raises:
        CaptureError: nothing is ready yet, and the current stream captures.
    """
    if device.type != "cuda" or dtype not in _DTYPES or hidden_size < 1:
        return f"there is no kernel for {dtype} rows of {hidden_size} on {device.type}"
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    key = (device, dtype, hidden_size)
    if key not in _kernels:
        raise_if_capturing(
            f"the kernel that adds and normalises {dtype} rows of {hidden_size} on {device} can't be compiled",
            "Call comm.pre_capture_init before the capture",
        )
        with _lock:
            if key not in _kernels:
                _kernels[key] = _compile(*key)
    kernel = _kernels[key]
    return kernel if isinstance(kernel, str) else ""


def add_rms_norm(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`comm_core.fallback.add_rms_norm` of CUDA tensors by one kernel; None, and nothing done, where there is none."""
    num_tokens, hidden_size = tensor.shape
    kernel = _kernels.get((tensor.device, tensor.dtype, hidden_size))
    if kernel is None:
        if tensor.dtype not in _DTYPES or torch.cuda.is_current_stream_capturing():
            return None
        prepare(tensor.device, tensor.dtype, hidden_size)
        kernel = _kernels.get((tensor.device, tensor.dtype, hidden_size))
    if kernel is None or isinstance(kernel, str) or not num_tokens:
        return None
    if not residual.device == weight.device == tensor.device:
        return None  # torch says what is wrong
    inputs = (tensor, residual, weight)
    if not all(map(plain, inputs)):
        # Not torch's kernels instead: those of two ranks would round differently.
        with torch.no_grad():
            inputs = tuple(plain_copy(item) for item in inputs)  # type: ignore[assignment]
    normed = out if out is not None and _direct(out, inputs) else torch.empty_like(inputs[0])
    summed = residual_out
    if summed is None or not _direct(summed, inputs) or not disjoint(normed, summed):
        summed = torch.empty_like(inputs[0])
    if torch.cuda.current_device() == tensor.device.index:
        kernel(num_tokens, *inputs, normed, summed, float(eps), float(weight_offset))
    else:
        with torch.cuda.device(tensor.device):
            kernel(num_tokens, *inputs, normed, summed, float(eps), float(weight_offset))
    return delivered(normed, out), delivered(summed, residual_out)


def _compile(device: torch.device, dtype: torch.dtype, hidden_size: int) -> _Launch | str:
    """The kernel, or why there is none; says so in the log, once for each reason."""
    try:
        from comm_core._handle import norm_triton

        with torch.cuda.device(device):
            return norm_triton.compiled(dtype, hidden_size)
    except Exception as error:  # noqa: BLE001 - Triton's border: it drives compilers, and any failure has a way out
        reason = f"Triton can't be used: {describe(error)}"
        if reason not in _kernels.values():
            _log.warning("comm_core: the composed norm takes several kernels instead of one: %s", reason)
        return reason


def _direct(target: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether the kernel may write to `target`: over a whole input that is like it, or apart from all."""
    *alike, weight = inputs
    return (
        plain(target)
        and disjoint(target, weight)
        and all(target.data_ptr() == other.data_ptr() or disjoint(target, other) for other in alike)
    )
