"""A handle's calls with every check: for operands that the hot path can't take, and after errors."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from comm_core._handle import checks, rank_order, traced
from comm_core._handle.checker import Checker
from comm_core._handle.lookup import BoundHook, CallKey, composed, new_counter
from comm_core._handle.operands import (
    copy_to_out,
    is_writable,
    may_write,
    stage_operands,
    to_kernel_ready,
    writable_by_hooks,
)
from comm_core.errors import CaptureError, CommError, CommTimeoutError
from comm_core.types import TERMINAL

if TYPE_CHECKING:
    from comm_core._handle.checks import NumTokens
    from comm_core._handle.lookup import CaptureRoutes, Routes
    from comm_core._handle.serving import Serving

__all__ = ["CheckedCalls"]

# Texts of Gloo, "Invalid scalar type", and of NCCL, "... data type is not supported ..." and "Unconvertible NCCL type":
# raised before anything is sent.
_DTYPE_ERROR = re.compile(r"(scalar|data|NCCL) type")


class CheckedCalls:
    """The part of a handle behind its hot path.

    Attributes:
        group_name: the name of the process group; "" without one.
    """

    def __init__(self, serving: Serving, group_name: str = "") -> None:
        self.group_name = group_name
        self._serving = serving
        # What the next call reads its routes from: during a call `_in_use`, which refuses a second thread's call.
        self._idle: Serving | _InUse = serving
        self._in_use = _InUse(serving)
        self._checker = Checker(serving.device)

    def all_reduce(
        self, tensor: torch.Tensor, out: torch.Tensor | None = None, num_tokens: NumTokens = None
    ) -> torch.Tensor:
        """See `Backend.all_reduce`."""
        return self._all_reduce_slow(tensor, out, num_tokens)

    def _all_reduce_slow(
        self, tensor: torch.Tensor, out: torch.Tensor | None, num_tokens: NumTokens = None
    ) -> torch.Tensor:
        """Serve a call that the hot path can't: check its operands, stage them through copies, and look up a route."""
        checks.check_tensors(tensor=tensor)
        checks.warn_without_gradient(tensor)
        if traced.intercepts():
            self._require_open()
            return traced.all_reduce(self, tensor, out, num_tokens=num_tokens)
        checks.refuse_jit_trace()
        has_route = self._check_supported(tensor)
        if out is not None:
            checks.check_out(tensor, out)
        count = None if num_tokens is None else checks.check_num_tokens(num_tokens, tensor)
        if tensor.is_complex():
            parts = torch.view_as_real(tensor.detach().resolve_conj().resolve_neg())
            return copy_to_out(torch.view_as_complex(self._all_reduce_slow(parts, None)), out)
        # An empty tensor takes its turn as one zero, so that ranks with other sizes notice.
        operand = to_kernel_ready(tensor) if tensor.numel() else tensor.new_zeros(1)
        direct = None
        refused = out is not None and not may_write(out)
        if out is tensor and not refused and operand.data_ptr() == tensor.data_ptr():
            direct = operand
        elif out is not None and not refused and is_writable(operand.get_device(), operand, out):
            direct = out
        if has_route:
            key = (operand.get_device(), operand.dtype, operand.numel())
            always_checked = refused or tensor.is_neg()
            bound = self._find("all_reduce", key, count if tensor.numel() else None, always_checked=always_checked)
            result = self._run(bound, "all_reduce", operand, direct)
        else:
            result = self._all_reduce_by_torch(operand)
        if out is not None and result is direct:
            return out
        return copy_to_out(result if tensor.numel() else traced.empty_contiguous(tensor), out)

    def _fused_slow(  # noqa: C901, PLR0912, PLR0915 - a third of its time would be calls of its parts
        self,
        key: CallKey | None,
        bound: BoundHook | None,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        num_tokens: NumTokens = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serve a fused call that no hook took directly: check the operands, stage them, or compose the call.

        `bound` is the hook for `key` once such calls have been checked in full; `key` is None if the operands may be
        anything.
        """
        operands = None
        if bound is not None and bound[0] is not composed and key is not None and residual is not None:
            index, dtype, shape = key
            try:
                if (
                    residual.shape == shape
                    and weight.shape == shape[1:]
                    and residual.dtype is dtype
                    and weight.dtype is dtype
                    and residual.get_device() == index
                    and weight.get_device() == index
                    # "meta" has the CPU's index.
                    and (index >= 0 or (tensor.is_cpu and residual.is_cpu and weight.is_cpu))
                ):
                    operands = stage_operands(tensor, residual, weight, out, residual_out)
            except (AttributeError, RuntimeError):  # an operand isn't a tensor, or is a sparse one without an address
                operands = None
        if operands is None:
            checks.check_tensors(tensor=tensor, residual=residual, weight=weight)
            like = tensor if residual is None else residual
            if tensor.dim() != 2 and tensor.layout is like.layout is torch.strided:
                return self._fused_rows(tensor, residual, weight, eps, weight_offset, out, residual_out, num_tokens)
            checks.warn_without_gradient(tensor, like)
            if traced.intercepts():
                self._require_open()
                return traced.all_reduce_add_rms_norm(
                    *(self, tensor, residual, weight, eps, weight_offset),
                    out=out,
                    residual_out=residual_out,
                    num_tokens=num_tokens,
                )
            checks.refuse_jit_trace()
            self._check_operands(tensor, residual, weight, out, residual_out)
            key = (tensor.get_device(), tensor.dtype, tensor.shape)
            count = None if num_tokens is None else checks.check_num_tokens(num_tokens, tensor)
            outs = writable_by_hooks(out), writable_by_hooks(residual_out)
            negated = tensor.is_neg() or like.is_neg() or weight.is_neg()
            always_checked = negated or outs[0] is not out or outs[1] is not residual_out
            bound = self._find("all_reduce_add_rms_norm", key, count, always_checked=always_checked)
            if bound[0] is not composed and residual is not None and not checks.is_mixed(tensor, residual, weight):
                inputs = tensor.resolve_neg(), residual.resolve_neg(), weight.resolve_neg()
                operands = stage_operands(*inputs, *outs)
        elif (out is not None and operands[3] is not tensor) or (
            residual_out is not None and operands[4] is not residual
        ):
            checks.check_fused_outs(tensor, residual, out, residual_out)
        if operands is not None and bound is not None:
            x, r, w, y_out, s_out = operands
            # As in `_run`, whose call and tuple would take 0.2 us.
            function, session, name, _, counter = bound
            serving = self._idle
            self._idle = self._in_use
            if serving is self._in_use:
                self._in_use.refuse()
            try:
                results = function(session, x, r, w, eps, weight_offset, y_out, s_out)
            except BaseException as error:  # noqa: BLE001 - plugin boundary: re-raised with the backend's name
                self._stop(error, name, "all_reduce_add_rms_norm")
            finally:
                self._idle = serving
            if results is not NotImplemented:
                for _counted in counter:  # counts the call; see `CallCounter`
                    break
                y, s = results
                return y if out is None or y is out else copy_to_out(y, out), (
                    s if residual_out is None or s is residual_out else copy_to_out(s, residual_out)
                )
        if bound is not None and bound[0] is composed:
            counter = bound[4]
        else:  # the hook declined the call, or no hook takes such operands
            key = key or (tensor.get_device(), tensor.dtype, tensor.shape)
            counter = self._serving.fused_routes.counter(key, TERMINAL)
        for _counted in counter:
            break
        add_rms_norm = rank_order.norm_for(tensor, residual, weight, deterministic=self._serving.decision.deterministic)
        total = self.all_reduce(tensor, num_tokens=num_tokens)
        if out is None and total.is_cuda:
            out = total  # a temporary of this call, and the norm's kernel can work in place
        return add_rms_norm(total, residual, weight, eps, weight_offset, out, residual_out)

    def _fused_rows(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        num_tokens: NumTokens,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serve a fused call of `[..., hidden_size]` by a call of `[num_tokens, hidden_size]`."""
        checks.check_fused_inputs(tensor, residual, weight)
        checks.check_fused_outs(tensor, residual, out, residual_out)
        shape = tensor.shape
        rows = (math.prod(shape[:-1]), shape[-1])
        views = {id(operand): operand.reshape(rows) for operand in (tensor, residual) if operand is not None}

        def rows_of(target: torch.Tensor | None) -> torch.Tensor | None:
            if target is None or not target.is_contiguous():
                return None
            return views.get(id(target), target.view(rows))

        x, r = views[id(tensor)], views.get(id(residual))
        outs = (rows_of(out), rows_of(residual_out))
        y, s = self._fused_slow(None, None, x, r, weight, eps, weight_offset, *outs, num_tokens)
        return (
            out if out is not None and out.is_contiguous() else copy_to_out(y.view(shape), out),
            residual_out
            if residual_out is not None and residual_out.is_contiguous()
            else copy_to_out(s.view(shape), residual_out),
        )

    def _find(
        self, op: str, key: CallKey, count: torch.Tensor | None = None, *, always_checked: bool = False
    ) -> BoundHook:
        """Return the hook that serves `op` for this key, after the checks; `count`: of a padded batch's real rows."""
        bound = self._serving.routes_of(op).find(key, always_checked=always_checked)
        if bound is None:
            self._require_open()  # another thread closed or suspended the handle meanwhile
            raise AssertionError(f"no route for {key}")
        if count is None:
            return bound
        try:
            return self._serving.bind_padded(op, key, bound, count)
        except BaseException as error:  # noqa: BLE001 - plugin boundary: re-raised with the backend's name
            self._stop(error, bound[2], "padded_session")

    def _run(self, bound: BoundHook, op: str, *operands: Any) -> Any:
        """Call a hook, as the only thread of this handle; an error stops the handle."""
        function, session, name, _, counter = bound
        serving = self._idle
        self._idle = self._in_use
        if serving is self._in_use:
            self._in_use.refuse()
        for _counted in counter:
            break
        try:
            return function(session, *operands)
        except BaseException as error:  # noqa: BLE001 - plugin boundary: re-raised with the backend's name
            self._stop(error, name, op)
        finally:
            self._idle = serving

    def _all_reduce_by_torch(self, operand: torch.Tensor) -> torch.Tensor:
        """Sum a tensor of a kind that no route covers with torch.distributed, if that can.

        Raises:
            TypeError: torch.distributed can't sum this dtype; raised before anything is sent.
        """
        function, session = self._serving.terminal
        refusals = []

        def sum_or_refuse(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (TypeError, ValueError, RuntimeError) as error:
                # The second: torch's operator takes no such tensor, as a quantised one.
                if not _DTYPE_ERROR.search(str(error)) and not isinstance(error, NotImplementedError):
                    raise
                refusals.append(error)
                return operand

        bound = (sum_or_refuse, session, TERMINAL, False, new_counter())
        result: torch.Tensor = self._run(bound, "all_reduce", operand, None)
        if refusals:
            raise TypeError(
                f"a tensor of {operand.dtype} can't be reduced: no backend takes this dtype, and torch.distributed "
                f"can't sum it on {operand.device.type} either ({refusals[0]}). Convert it first"
            ) from refusals.pop()
        key = (operand.device.type, operand.dtype, operand.numel())
        for _counted in self._serving.all_reduce_routes.counter(key, TERMINAL):
            break
        return result

    def _require_idle(self) -> None:
        """Raise `CommError`, and stop the handle, if a thread is in a call."""
        if self._idle is self._in_use:
            self._in_use.refuse()

    def _require_open(self) -> None:
        if self._serving.refusal is not None:
            raise CommError(self._serving.refusal)

    def _check_supported(self, tensor: torch.Tensor) -> bool:
        """Return whether the group has a route for the tensor's device and dtype; False if only torch may sum it.

        Raises:
            CommError: the handle is closed or suspended, or has stopped after a failure.
            TypeError: the tensor isn't strided.
            ValueError: the group serves no tensors on this device.
        """
        self._require_open()
        serving = self._serving
        is_routed = tensor.device in serving.devices
        if (is_routed or tensor.device.type in serving.torch_device_types) and tensor.layout is not torch.strided:
            raise TypeError(f"a tensor of layout {tensor.layout} can't be reduced; convert it first, by to_dense()")
        if is_routed:
            dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
            return (tensor.get_device(), dtype) in serving.eager.all_reduce.entries
        if tensor.device.type in serving.torch_device_types:
            return False
        names = ", ".join(sorted(map(str, serving.devices)))
        text = f"a tensor on {tensor.device} can't be reduced in {serving.title}, which serves tensors on {names}"
        if tensor.device.type == serving.device.type:
            # Other ranks may have passed tensors on the right devices, and would wait.
            text += (
                f": {serving.device} was this rank's device when it called comm.get_backend. Call "
                "torch.cuda.set_device before, or pass device_id to init_process_group"
            )
            serving.fail(text)
            raise ValueError(text)
        raise ValueError(
            f"{text}. To serve both CPU and CUDA tensors, create the group with backend='cpu:gloo,cuda:nccl'"
        )

    def _check_operands(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> None:
        """Raise if a fused call's operands are invalid; see `all_reduce_add_rms_norm`."""
        self._require_open()
        checks.check_fused_inputs(tensor, residual, weight)
        self._check_supported(tensor)
        like = tensor if residual is None else residual
        if not tensor.device == like.device == weight.device:
            raise ValueError(f"expected one device; got {tensor.device}, {like.device} and {weight.device}")
        for other in (like, weight):
            self._check_supported(other)
        checks.check_fused_outs(tensor, residual, out, residual_out)

    def _stop(self, error: BaseException, name: str, hook: str) -> NoReturn:
        """Re-raise a hook's error as a `CommError` that names the backend, and stop the handle.

        The call may have begun, so this rank's count of calls may differ from its peers', and every later sum could be
        wrong. Only a `CaptureError` is raised before anything is sent, on all ranks alike.
        """
        text = self._serving.describe_failure(name, hook, error)
        if isinstance(error, CaptureError):
            raise CaptureError(text) from error
        if isinstance(error, CommTimeoutError):
            text += self._serving.describe_other_groups()
        cause = self._serving.fail(text, (name, hook, error))
        # Serving engines catch the first type and retry with a smaller batch; a new group can serve it.
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
            raise error
        if cause:
            text += f". Before that, {cause}"
        if isinstance(error, CommTimeoutError):
            raise CommTimeoutError(text, error.ranks) from error
        raise CommError(text) from error


class _InUse:
    """Takes the place of a handle's routes during a call, and refuses a second thread's call.

    The ranks could pair two threads' calls in different orders, so the handle stops.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def refuse(self) -> NoReturn:
        """Stop the handle and raise `CommError`."""
        text = (
            f"two threads used the handle of {self._serving.title} at once: the ranks could pair their calls in "
            "different orders. Call it from one thread at a time, in an order that is the same on all ranks, or give "
            "each thread a group of its own"
        )
        self._serving.fail(text)
        raise CommError(self._serving.failure)

    @property
    def all_reduce_routes(self) -> Routes | CaptureRoutes:
        """Refuse the call."""
        self.refuse()

    @property
    def fused_routes(self) -> Routes | CaptureRoutes:
        """Refuse the call."""
        self.refuse()
