"""A handle's fused calls with a quantised result: checked, staged for a backend's hook, or composed."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from comm_core._handle import checks, quant, traced
from comm_core._handle.checked_calls import CheckedCalls
from comm_core._handle.lookup import composed
from comm_core._handle.operands import (
    copy_to_out,
    disjoint,
    is_kernel_ready,
    to_kernel_ready,
    writable_by_hooks,
    writable_or_none,
)
from comm_core.types import TERMINAL

if TYPE_CHECKING:
    from comm_core._handle.checks import NumTokens
    from comm_core._handle.lookup import BoundHook

    #: The quantised values, their scales, the sum with the residual, and the norm if it is wanted.
    QuantResults = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]

__all__ = ["QuantCalls"]

_OP = "all_reduce_add_rms_norm_quant"


class QuantCalls(CheckedCalls):
    """The part of a handle behind `all_reduce_add_rms_norm_quant`."""

    def _quant_call(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        form: str,
        scale: torch.Tensor | None,
        column_major_scales: bool,
        with_norm: bool,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        norm_out: torch.Tensor | None,
        num_tokens: NumTokens,
    ) -> QuantResults:
        """Serve a call by a backend's hook, or compose it of a fused call and a quantisation."""
        checks.check_tensors(tensor=tensor, residual=residual, weight=weight)
        like = tensor if residual is None else residual
        if tensor.dim() != 2 and tensor.layout is like.layout is torch.strided:
            return self._quant_rows(
                *(tensor, residual, weight, eps, weight_offset, form, scale, column_major_scales, with_norm),
                *(out, residual_out, norm_out, num_tokens),
            )
        checks.warn_without_gradient(tensor, like)
        if traced.intercepts():
            self._require_open()
            return traced.all_reduce_add_rms_norm_quant(
                *(self, tensor, residual, weight, eps, weight_offset),
                quant=form,
                scale=scale,
                column_major_scales=column_major_scales,
                with_norm=with_norm,
                out=out,
                residual_out=residual_out,
                norm_out=norm_out,
                num_tokens=num_tokens,
            )
        checks.refuse_jit_trace()
        self._check_operands(tensor, residual, weight, None, residual_out)
        if norm_out is not None:
            checks.check_out(tensor, norm_out, "norm_out")
        quant.check_operands(tensor, form, scale, out)
        written = {"out": out, "residual_out": residual_out, "norm_out": norm_out}
        _check_disjoint(written if quant.is_static(form) else {**written, "scale": scale})
        if scale is None:
            scale = quant.empty_scale(tensor, form, column_major_scales)
        with_norm = with_norm or norm_out is not None
        key = (tensor.get_device(), tensor.dtype, tensor.shape)
        count = None if num_tokens is None else checks.check_num_tokens(num_tokens, tensor)
        bound = self._find(_OP, key, count)
        counter = bound[4]
        if bound[0] is not composed:
            if residual is not None and not checks.is_mixed(tensor, residual, weight):
                operands = (tensor, residual, weight, eps, weight_offset, form, scale, out, residual_out)
                results = self._quant_by_hook(bound, *operands, norm_out, with_norm)
                if results is not None:
                    return results
            counter = self._serving.quant_routes.counter(key, TERMINAL)
        for _counted in counter:
            break
        y, s = self.all_reduce_add_rms_norm(
            *(tensor, residual, weight, eps, weight_offset),
            out=norm_out,
            residual_out=residual_out,
            num_tokens=num_tokens,
        )
        return (*quant.quantize(y, form, scale, out), s, y if with_norm else None)

    def all_reduce_add_rms_norm(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        *,
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
        num_tokens: NumTokens = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.all_reduce_add_rms_norm`."""
        return self._fused_slow(None, None, tensor, residual, weight, eps, weight_offset, out, residual_out, num_tokens)

    def _quant_by_hook(
        self,
        bound: BoundHook,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        form: str,
        scale: torch.Tensor,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        norm_out: torch.Tensor | None,
        with_norm: bool,
    ) -> QuantResults | None:
        """Call the hook with staged operands; return None if it declines the call."""
        x, r, w = map(to_kernel_ready, (tensor, residual, weight))
        scales, writes_scales = scale.detach().resolve_neg(), not quant.is_static(form)
        inputs = (x, r, w) if writes_scales else (x, r, w, scales)
        s = writable_or_none(writable_by_hooks(residual_out), r, (x, w, *inputs[3:]))
        s = torch.empty_like(r) if s is None else s
        y = None
        if with_norm:
            y = writable_or_none(writable_by_hooks(norm_out), x, (r, w, *inputs[3:]))
            y = torch.empty_like(x) if y is None else y
        q = writable_by_hooks(out)
        if q is None or not is_kernel_ready(q) or not all(disjoint(q, other) for other in inputs):
            q = quant.empty_out(x)
        # `disjoint` takes contiguous tensors, and scales may have room between their columns.
        if writes_scales and (
            not quant.is_writable_scale(scales) or any(checks.share_memory(scales, other) for other in inputs)
        ):
            scales = torch.empty_like(scales)
        function, session, name, _, counter = bound
        serving = self._idle
        self._idle = self._in_use
        if serving is self._in_use:
            self._in_use.refuse()
        try:
            answer = function(session, x, r, w, eps, weight_offset, form, scales, q, s, y)
        except BaseException as error:  # noqa: BLE001 - plugin boundary: re-raised with the backend's name
            self._stop(error, name, _OP)
        finally:
            self._idle = serving
        if answer is NotImplemented:
            return None
        for _counted in counter:
            break
        if writes_scales and scales.data_ptr() != scale.data_ptr():
            copy_to_out(scales, scale)
        return (
            copy_to_out(q, out),
            scale,
            copy_to_out(s, residual_out),
            y if y is None else copy_to_out(y, norm_out),
        )

    def _quant_rows(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        form: str,
        scale: torch.Tensor | None,
        column_major_scales: bool,
        with_norm: bool,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        norm_out: torch.Tensor | None,
        num_tokens: NumTokens,
    ) -> QuantResults:
        """Serve a call of `[..., hidden_size]` by a call of `[num_tokens, hidden_size]`."""
        checks.check_fused_inputs(tensor, residual, weight)
        checks.check_fused_outs(tensor, residual, None, residual_out)
        if norm_out is not None:
            checks.check_out(tensor, norm_out, "norm_out")
        quant.check_operands(tensor, form, scale, out)
        shape = tensor.shape
        num_rows = math.prod(shape[:-1])
        views = {id(item): item.reshape(num_rows, shape[-1]) for item in (tensor, residual) if item is not None}

        def rows_of(target: torch.Tensor | None) -> torch.Tensor | None:
            if target is None or not target.is_contiguous():
                return None
            return views.get(id(target), target.view(num_rows, target.shape[-1]))

        q, scales, s, y = self._quant_call(
            *(views[id(tensor)], views.get(id(residual)), weight, eps, weight_offset, form),
            scale if quant.is_static(form) else rows_of(scale),
            column_major_scales,
            with_norm or norm_out is not None,
            *(rows_of(out), rows_of(residual_out), rows_of(norm_out), num_tokens),
        )

        def shaped(result: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
            if target is not None and target.is_contiguous():
                return target
            return copy_to_out(result.view(*shape[:-1], result.shape[-1]), target)

        return (
            shaped(q, out),
            scale if scale is not None and quant.is_static(form) else shaped(scales, scale),
            shaped(s, residual_out),
            y if y is None else shaped(y, norm_out),
        )


def _check_disjoint(written: dict[str, torch.Tensor | None]) -> None:
    """Raise `ValueError` if two outputs share memory."""
    given = [(name, item) for name, item in written.items() if item is not None]
    for (one_name, one), (name, other) in itertools.combinations(given, 2):
        if one is other or checks.share_memory(one, other):
            raise ValueError(
                f"{one_name} and {name} share memory, but the call writes a different result to each; pass disjoint "
                "tensors"
            )
