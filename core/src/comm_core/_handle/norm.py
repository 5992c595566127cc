"""The Triton kernels behind `comm_core.fallback`: compiled once a process, launched on CUDA tensors.

`add_rms_norm` launches its kernel here; `quant.py` gets the one of `quantize` from `quant_kernel`.

FlashInfer's `fused_add_rmsnorm` rounds alike, but works only in place, in half precisions, and with a weight offset of
0 or 1; every other call would need copies. `benchmarks/add_rms_norm.py` times both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from comm_core._control.deadline import describe
from comm_core._control.guard import raise_if_capturing
from comm_core._handle.operands import copy_to_out, disjoint, is_kernel_ready, to_kernel_ready

__all__ = ["add_rms_norm", "prepare", "prepare_for", "quant_kernel"]

_log = logging.getLogger("comm_core")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The device, the tensor's dtype, a row's elements, and the dtypes of the residual (None without one) and the weight.
_Key = tuple[torch.device, torch.dtype, int, torch.dtype | None, torch.dtype]
# Takes (num_tokens, tensor, residual, weight, normed, summed, eps, weight_offset).
_Launch = Callable[..., None]
# A text is the reason why the kernel can't be compiled.
_kernels: dict[_Key, _Launch | str] = {}
# Take (num_tokens, normed, out, scale, row_stride, column_stride), by device, dtype, elements of a row and form.
_quant_kernels: dict[tuple[torch.device, torch.dtype, int, int], _Launch | str] = {}
_lock = threading.Lock()


def prepare(device: torch.device, dtype: torch.dtype, hidden_size: int) -> str:
    """Compile the kernel for rows of `hidden_size` elements of `dtype`, once a process. Local.

    Otherwise the first call outside a capture compiles it. A capture before that records torch's own kernels, which are
    slower.

    Args:
        device: the device of the tensors.
        dtype: the dtype of the tensors, the residual and the weight among them.
        hidden_size: elements a row.

    Returns:
        "" if the kernel is ready; else the reason why torch's own kernels are used, one sentence without a full stop.

    Raises:
        CaptureError: the kernel isn't compiled yet, and the current stream captures.
    """
    if device.type != "cuda" or dtype not in _DTYPES or hidden_size < 1:
        return f"there is no kernel for {dtype} rows of {hidden_size} on {device.type}"
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return _prepare((device, dtype, hidden_size, dtype, dtype))


def prepare_for(tensor: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Compile the kernel for these operands of `add_rms_norm`, if there is one, once a process. Local.

    Raises:
        CaptureError: as in `prepare`.
    """
    key = _key_of(tensor, residual, weight)
    if tensor.is_cuda and _can_compile(key):
        _prepare(key)


def _key_of(tensor: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> _Key:
    return tensor.device, tensor.dtype, tensor.shape[-1], None if residual is None else residual.dtype, weight.dtype


def _can_compile(key: _Key) -> bool:
    """Return whether there is a kernel for rows of this length and these dtypes."""
    _, dtype, hidden_size, residual_dtype, weight_dtype = key
    return hidden_size > 0 and {dtype, residual_dtype or dtype, weight_dtype}.issubset(_DTYPES)


def _prepare(key: _Key) -> str:
    """Compile the kernel of this key, once a process; see `prepare`."""
    if key not in _kernels:
        device, dtype, hidden_size, _, _ = key
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
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute `comm_core.fallback.add_rms_norm` with one kernel; return None, with nothing done, if it can't serve."""
    key = _key_of(tensor, residual, weight)
    kernel = _kernels.get(key)
    if kernel is None:
        if not _can_compile(key) or torch.cuda.is_current_stream_capturing():
            return None
        _prepare(key)
        kernel = _kernels.get(key)
    num_tokens = len(tensor)
    if kernel is None or isinstance(kernel, str) or not num_tokens:
        return None
    # Without a residual, the kernel doesn't read that argument.
    inputs = (tensor, tensor if residual is None else residual, weight)
    if not inputs[1].device == weight.device == tensor.device:
        return None  # torch's own kernels then raise the error
    if not all(map(is_kernel_ready, inputs)):
        # Copies, because torch's kernels round differently, and other ranks' tensors may need no copy.
        with torch.no_grad():
            inputs = tuple(to_kernel_ready(item) for item in inputs)  # type: ignore[assignment]
    normed = out if out is not None and _is_writable(out, inputs) else torch.empty_like(inputs[0])
    summed = residual_out
    if summed is None or not _is_writable(summed, inputs) or not disjoint(normed, summed):
        summed = torch.empty_like(inputs[1])
    if torch.cuda.current_device() == tensor.device.index:
        kernel(num_tokens, *inputs, normed, summed, float(eps), float(weight_offset))
    else:
        with torch.cuda.device(tensor.device):
            kernel(num_tokens, *inputs, normed, summed, float(eps), float(weight_offset))
    return copy_to_out(normed, out), copy_to_out(summed, residual_out)


def _compile(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype,
) -> _Launch | str:
    """Compile the kernel; on failure log the reason once, and return it."""
    try:
        from comm_core._handle import norm_triton

        with torch.cuda.device(device):
            return norm_triton.compile_kernel(dtype, hidden_size, residual_dtype, weight_dtype)
    except Exception as error:  # noqa: BLE001 - Triton runs compilers that fail in any way; torch's kernels serve instead
        return _explain_failure(error, "norm")


def quant_kernel(device: torch.device, dtype: torch.dtype, hidden_size: int, form: int) -> _Launch | None:
    """Return the kernel that quantises rows, compiled once a process; None if it can't be compiled, or not now.

    Args:
        device: the device of the tensors.
        dtype: the dtype of the norm.
        hidden_size: elements a row.
        form: the index in `comm_core.types.QUANTS`.
    """
    key = (device, dtype, hidden_size, form)
    kernel = _quant_kernels.get(key)
    if kernel is None:
        if dtype not in _DTYPES or hidden_size < 1 or torch.cuda.is_current_stream_capturing():
            return None
        with _lock:
            if key not in _quant_kernels:
                _quant_kernels[key] = _compile_quant(*key)
        kernel = _quant_kernels[key]
    return None if isinstance(kernel, str) else kernel


def _compile_quant(device: torch.device, dtype: torch.dtype, hidden_size: int, form: int) -> _Launch | str:
    """Compile the kernel; on failure log the reason once, and return it."""
    try:
        from comm_core._handle import quant_triton

        with torch.cuda.device(device):
            return quant_triton.compile_kernel(dtype, hidden_size, form)
    except Exception as error:  # noqa: BLE001 - as in `_compile`
        return _explain_failure(error, "quantisation")


def _explain_failure(error: Exception, what: str) -> str:
    """Return why Triton can't be used; log it if it is new."""
    reason = f"Triton can't be used: {describe(error)}"
    if reason not in _kernels.values() and reason not in _quant_kernels.values():
        _log.warning("comm_core: the composed %s runs as several torch kernels, which is slower: %s", what, reason)
    return reason


def _is_writable(target: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Return whether the kernel may write to `target`.

    It must be disjoint from the weight, and share with each other input either no memory, or all of it element by
    element.
    """
    *same_shape, weight = inputs
    return (
        is_kernel_ready(target)
        and disjoint(target, weight)
        and all(
            (target.data_ptr() == other.data_ptr() and target.dtype == other.dtype) or disjoint(target, other)
            for other in same_shape
        )
    )
