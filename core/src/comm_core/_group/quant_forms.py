"""The admission test's calls of `all_reduce_add_rms_norm_quant`: every form that the backend takes, bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from comm_core._group.failures import describe_wrong
from comm_core._handle import quant
from comm_core.types import QUANTS

__all__ = ["EPS", "QuantCall", "call_every_form", "check_bits"]

#: The test's norms add it to the mean square.
EPS = 1e-6
# Saturates the larger ones of the test's norms, and isn't a power of two.
_STATIC_SCALE = 0.01


@dataclasses.dataclass(frozen=True)
class QuantCall:
    """The outputs of one call.

    Attributes:
        form: one of `QUANTS`.
        scale: the scale that was given, or the scales.
        quantized: the quantised norm.
        summed: the sum with the residual.
        normed: the norm; None in a call that doesn't ask for it.
        reference: the norm of the backend's call without a quantisation; None: not to be compared.
    """

    form: str
    scale: torch.Tensor
    quantized: torch.Tensor
    summed: torch.Tensor
    normed: torch.Tensor | None
    reference: torch.Tensor | None = None


def call_every_form(
    hook: Callable[..., Any],
    session: Any,
    inputs: Sequence[torch.Tensor],
    *,
    in_place: bool,
    reference: torch.Tensor | None = None,
) -> list[QuantCall]:
    """Call the hook in each form, with and without the norm; leave out the forms that it declines.

    Args:
        hook: the hook.
        session: its session.
        inputs: the tensor, the residual and the weight.
        in_place: whether the norm goes into the tensor, and the sum into the residual; these are copies then.
        reference: see `QuantCall`.

    Raises:
        NotImplementedError: the hook declines every form, or a form only with or only without the norm.
    """
    calls: list[QuantCall] = []
    for form in QUANTS:
        if form == "fp8_per_group" and inputs[0].shape[-1] % quant.GROUP_SIZE:
            continue
        answers = [_call(hook, session, inputs, form, in_place, with_norm) for with_norm in (True, False)]
        taken = [answer for answer in answers if answer is not None]
        if len(taken) == 1:
            raise NotImplementedError(f"{form}: it returned NotImplemented in one of two calls")
        calls += taken
    if not calls:
        raise NotImplementedError("it returned NotImplemented in every form")
    return [dataclasses.replace(call, reference=reference) for call in calls]


def _call(
    hook: Callable[..., Any],
    session: Any,
    inputs: Sequence[torch.Tensor],
    form: str,
    in_place: bool,
    with_norm: bool,
) -> QuantCall | None:
    tensor, residual, weight = inputs
    if in_place:
        tensor, residual = tensor.clone(), residual.clone()
    # Scales for groups in both layouts: the call without the norm has column-major ones.
    if quant.is_static(form):
        scale = torch.full((1,), _STATIC_SCALE, device=tensor.device)
    else:
        scale = quant.empty_scale(tensor, form, not with_norm)
    out, summed = quant.empty_out(tensor), residual if in_place else torch.empty_like(residual)
    normed = (tensor if in_place else torch.empty_like(tensor)) if with_norm else None
    answer = hook(session, tensor, residual, weight, EPS, 0.0, form, scale, out, summed, normed)
    return None if answer is NotImplemented else QuantCall(form, scale, out, summed, normed)


def check_bits(calls: Sequence[QuantCall]) -> None:
    """Raise `ArithmeticError` if a call's values or scales aren't those of its norm, or this isn't the reference.

    A call without the norm is compared with the norm of the same form's other call.
    """
    norms = {call.form: call.normed for call in calls if call.normed is not None}
    for call in calls:
        if call.normed is not None and call.reference is not None:
            # As bytes: a zero's sign stays in FP8.
            wrong = (call.normed.view(torch.uint8) != call.reference.view(torch.uint8)).any(-1)
            if bool(wrong.any()):
                raise ArithmeticError(
                    f"{call.form}: the norms of {int(wrong.sum())} rows haven't the bits of all_reduce_add_rms_norm"
                )
        scale = call.scale if quant.is_static(call.form) else torch.empty_like(call.scale)
        expected, scale = quant.quantize_by_torch(norms[call.form], call.form, scale)
        wrong = call.scale != scale
        if bool(wrong.any()):
            text = describe_wrong("scales aren't those of the norm", wrong, call.scale, scale)
            raise ArithmeticError(f"{call.form}: {text}")
        wrong = call.quantized.view(torch.uint8) != expected.view(torch.uint8)
        if bool(wrong.any()):
            text = describe_wrong("values aren't those of the norm", wrong, call.quantized, expected)
            raise ArithmeticError(f"{call.form}: {text}")
