"""A handle that compares each call between the ranks before it runs: for finding ranks that don't make the same calls.

Like the wrapper of torch.distributed under `TORCH_DISTRIBUTED_DEBUG=DETAIL`, but over the job's store, which works even
if the process group doesn't.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from comm_core._control.deadline import raises_interrupts
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._handle import traced
from comm_core._handle.backend import Backend
from comm_core._plan.checks import describe_differences
from comm_core.errors import CommError, CommTimeoutError

if TYPE_CHECKING:
    from comm_core._handle.serving import Serving
    from comm_core.tokens import TokenCounts

__all__ = ["ComparingBackend"]


class ComparingBackend(Backend):
    """A `Backend` that compares operation, shapes, dtypes and number of each call over the job's store.

    Args:
        serving: the plan to serve by.
        group_name: the name of the process group.
    """

    def __init__(self, serving: Serving, group_name: str) -> None:
        super().__init__(serving, group_name)
        self._calls = 0
        self._calls_control = serving.control
        self._is_inside = False

    def all_reduce(
        self,
        tensor: torch.Tensor,
        out: torch.Tensor | None = None,
        num_tokens: TokenCounts | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backend.all_reduce`."""
        with self._compared("all_reduce", tensor=tensor, out=out, num_tokens=num_tokens):
            return super().all_reduce(tensor, out, num_tokens)

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
        num_tokens: TokenCounts | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.all_reduce_add_rms_norm`."""
        named: dict[str, Any] = {"out": out, "residual_out": residual_out, "num_tokens": num_tokens}
        with self._compared("all_reduce_add_rms_norm", tensor=tensor, residual=residual, weight=weight, **named):
            return super().all_reduce_add_rms_norm(tensor, residual, weight, eps, weight_offset, **named)

    def all_reduce_add_rms_norm_quant(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        *,
        quant: str,
        scale: torch.Tensor | None = None,
        column_major_scales: bool = False,
        with_norm: bool = False,
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
        norm_out: torch.Tensor | None = None,
        num_tokens: TokenCounts | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `Backend.all_reduce_add_rms_norm_quant`."""
        # With every default: torch.compile reads them here for the function that it traces instead.
        named: dict[str, Any] = {"scale": scale, "out": out, "residual_out": residual_out, "norm_out": norm_out}
        named["num_tokens"] = num_tokens
        operands = {"tensor": tensor, "residual": residual, "weight": weight} | named
        options: dict[str, Any] = {"column_major_scales": column_major_scales, "with_norm": with_norm}
        with self._compared(f"all_reduce_add_rms_norm_quant to {quant}", **operands):
            return super().all_reduce_add_rms_norm_quant(
                tensor, residual, weight, eps, weight_offset, quant=quant, **options, **named
            )

    @contextlib.contextmanager
    def _compared(self, op: str, **operands: object) -> Iterator[None]:
        """Compare a call before the block runs it, unless it is part of another call."""
        if self._is_inside:
            yield
            return
        self._compare(op, **operands)
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    @raises_interrupts
    def _compare(self, op: str, **operands: object) -> None:
        """Compare a call with the other ranks' calls.

        Raises:
            CommTimeoutError: a rank made no call in time.
            CommError: the ranks' calls differ; on all ranks. The handle stops.
        """
        control = self._serving.control
        if control is None or self._serving.refusal is not None or traced.intercepts():
            return  # nothing is sent
        if control is not self._calls_control:  # since `comm.recover`, before which the ranks' numbers may differ
            self._calls, self._calls_control = 0, control
        self._calls += 1
        described = (f"{name} {_describe(value)}" for name, value in operands.items() if value is not None)
        try:
            with Stage(control, f"call {self._calls}", self._serving.wait_timeout_s) as stage:
                calls = stage.all_gather(f"{op} of {', '.join(described)}")
        except StageAbortedError as error:
            text = f"{self._serving.title}: {error}"
            self._serving.fail(text)
            if isinstance(error, CommTimeoutError):
                raise CommTimeoutError(text, error.ranks) from error
            raise CommError(text) from error
        if any(call != calls[0] for call in calls):
            text = (
                f"{self._serving.title}: call {self._calls} differs between the ranks: {describe_differences(calls)}. "
                "All ranks must make the same calls in the same order"
            )
            self._serving.fail(text)
            raise CommError(self._serving.failure)


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device.type}"
