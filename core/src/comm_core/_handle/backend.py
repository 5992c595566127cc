"""The handle of a group: it routes each call to the backend that the ranks agreed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from comm_core._handle import fallback
from comm_core._handle.lookup import COMPOSED, BoundHook, CallKey
from comm_core._handle.operands import (
    TENSOR_TYPES,
    copy_to_out,
    disjoint,
    has_memory,
    is_kernel_ready,
    stage_operands,
    to_kernel_ready,
)
from comm_core.errors import CaptureError, CommError, CommTimeoutError
from comm_core.types import DTYPES, Decision

if TYPE_CHECKING:
    from comm_core._handle.serving import Serving
    from comm_core.topology import Topology

__all__ = ["Backend"]

_UNSUPPORTED = "float8, booleans, unsigned integers above 8 bits, sparse and quantised tensors aren't supported"


class Backend:
    """All-reduce for one process group; `comm_core.get_backend` returns it.

    `all_reduce` and `all_reduce_add_rms_norm` are Collective: every rank of the group makes the same calls in the same
    order, with tensors of the same shape and dtype. Results carry no gradient. Only one thread may use a handle at a
    time.

    Attributes:
        group_name: the name of the process group, by which `torch.ops.comm_core` finds this handle; "" without a
            process group.
    """

    def __init__(self, serving: Serving, group_name: str = "") -> None:
        self.group_name = group_name
        self._serving = serving

    @property
    def name(self) -> str:
        """The name of the backend that serves the smallest eager float32 message."""
        route = self.decision.route("all_reduce", "eager", self.topology.device_types[0], "float32")
        return route.backend_for(DTYPES["float32"])

    @property
    def decision(self) -> Decision:
        """The candidates and routes that the ranks agreed on, equal on every rank."""
        return self._serving.decision

    @property
    def topology(self) -> Topology:
        """The facts about every rank, its host and its device on which the decision is based."""
        return self._serving.topology

    @property
    def device(self) -> torch.device:
        """The device of the group's tensors: this rank's CUDA device if the group has one, else the CPU."""
        return self._serving.device

    @property
    def failure(self) -> str | None:
        """The reason why every call raises; None while the handle serves calls."""
        return self._serving.failure

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum `tensor` over the ranks of the group, elementwise.

        Args:
            tensor: any shape, also empty; one of the dtypes in `comm_core.types.DTYPES`, or complex. A tensor that
                isn't contiguous, or isn't aligned to 16 bytes, is copied first.
            out: the tensor that receives the sum, with the shape, dtype and device of `tensor`. Pass `tensor` itself to
                reduce in place. None allocates a new tensor.

        Returns:
            `out`, or a new contiguous tensor.

        Raises:
            TypeError: the dtype or layout isn't supported, or `tensor` has no memory, such as a `FakeTensor`; raised
                alike on all ranks, before anything is sent.
            ValueError: the group doesn't serve the tensor's device, or `out` doesn't match `tensor` or overlaps
                itself; raised alike on all ranks, before anything is sent.
            CommTimeoutError: a peer didn't join the call in time. Every later call on this handle raises `CommError`.
            CaptureError: a stream captures, and this call can't be captured yet; the text names the call to make
                before the capture.
            CommError: the handle is closed, or the backend failed; the text names the group or the backend.
        """
        index = tensor.get_device()
        try:
            key, address, contiguous = (index, tensor.dtype, tensor.nbytes), tensor.data_ptr(), tensor.is_contiguous()
        except RuntimeError:  # a sparse tensor has no address; checking the layout first costs every call 50 ns
            return self._all_reduce_slow(tensor, out)
        # An empty tensor has address 0. Tensors on the device "meta" have the CPU's index, -1.
        if address & 15 or not contiguous or not address or (index < 0 and not tensor.is_cpu):
            return self._all_reduce_slow(tensor, out)
        if tensor.__class__ not in TENSOR_TYPES and not has_memory(tensor):
            return self._all_reduce_slow(tensor, out)
        if out is not None and out is not tensor and not _is_writable(tensor, out):
            return self._all_reduce_slow(tensor, out)
        routes = self._serving.all_reduce_routes
        bound = routes.get(key) or routes.find(key)
        if bound is None:
            return self._all_reduce_slow(tensor, out)
        function, session, name, _ = bound
        try:
            return function(session, tensor, out)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - plugin boundary: re-raised with the backend's name
            self._raise(error, name, "all_reduce")

    def all_reduce_add_rms_norm(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        *,
        out: torch.Tensor | None = None,
        residual_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum `tensor` over the ranks, add the residual, and normalise the result with RMSNorm.

        Computes `s = sum over ranks of tensor + residual` and `y = s · rsqrt(mean(s², last axis) + eps) · (weight +
        weight_offset)`. One fused kernel serves the call if a backend offers one for this shape; otherwise core
        composes it of an all-reduce and a norm.

        Args:
            tensor: `[num_tokens, hidden_size]`, floating point.
            residual: like `tensor`; the same values on every rank.
            weight: `[hidden_size]`, the dtype of `tensor`; the same values on every rank.
            eps: added to the mean square.
            weight_offset: added to the weight, 1.0 for Gemma's norms.
            out: the tensor that receives `y`, like `tensor`; it may be `tensor` itself. None allocates a new tensor.
            residual_out: the tensor that receives `s`, like `tensor`. Pass `residual` itself to update it in place.
                None allocates a new tensor.

        Returns:
            `(y, s)`: `out` and `residual_out`, or the new tensors.

        Raises:
            TypeError: as in `all_reduce`, or the operands' dtypes differ or aren't floating point.
            ValueError: as in `all_reduce`, or the operands' shapes or devices don't match, or `out` and `residual_out`
                share memory.
            CommTimeoutError: as in `all_reduce`.
            CaptureError: as in `all_reduce`.
            CommError: as in `all_reduce`.
        """
        key = (tensor.get_device(), tensor.dtype, tensor.shape)
        bound = self._serving.fused_routes.get(key)
        if bound is not None:
            function, session, name, checks_operands = bound
            if (
                checks_operands
                and tensor.__class__ in TENSOR_TYPES
                and residual.__class__ in TENSOR_TYPES
                and weight.__class__ in TENSOR_TYPES
                and (out is None or out.__class__ in TENSOR_TYPES)
                and (residual_out is None or residual_out.__class__ in TENSOR_TYPES)
            ):
                try:
                    results = function(session, tensor, residual, weight, eps, weight_offset, out, residual_out)
                except Exception as error:  # noqa: BLE001 - plugin boundary, as above
                    self._check_operands(tensor, residual, weight)
                    for each in (out, residual_out):
                        if each is not None:
                            _check_out(tensor, each)
                    self._raise(error, name, "all_reduce_add_rms_norm")
                if results is not NotImplemented:
                    return results  # type: ignore[no-any-return]
        return self._fused_slow(key, bound, tensor, residual, weight, eps, weight_offset, out, residual_out)

    def check(self) -> None:
        """Raise the errors that kernels have reported since the last call, such as a peer that timed out in a replay.

        Local. A replay of a captured graph can't raise by itself, so call this after replays. It reads one word of host
        memory for each session.

        Raises:
            CommTimeoutError: a kernel gave up waiting for a peer, so earlier results are wrong; the text names the
                backend.
            CommError: another fault makes earlier results wrong, or the handle is closed.
        """
        if self.failure is not None:
            raise CommError(self.failure)
        for session in self._serving.all_sessions:
            hook = session.plugin.hooks.get("check")
            if hook is not None:
                try:
                    hook(session.value)
                except Exception as error:  # noqa: BLE001 - plugin boundary, as above
                    self._raise(error, session.plugin.name, "check")

    def limits(self) -> dict[str, dict[str, float]]:
        """Measure the lower bounds on each backend's time on this machine.

        Collective. May take some tenths of a second for each backend.

        Returns:
            By backend, the times in microseconds by a description of each bound; backends without the hook `limits`
            are left out.

        Raises:
            Exception: a backend's hook raised.
        """
        return {
            name: session.plugin.hooks["limits"](session.value)
            for name, session in self._serving.sessions.items()
            if session.plugin.has("limits")
        }

    def explain(self) -> str:
        """Return a report of the group's decision, equal on every rank.

        It lists every candidate with its verdict and reason, and for each kind of message the backends that serve it.
        """
        from comm_core._plan.explain import explain

        return explain(self._serving.title, self.topology, self.decision)

    def __repr__(self) -> str:
        return f"<comm_core.Backend {self.name!r} of {self._serving.title}>"

    def _fused_slow(
        self,
        key: CallKey,
        bound: BoundHook | None,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serve a fused call that no hook took directly: validate the operands, stage them, or compose the call."""
        index, dtype, shape = key
        if (
            bound is None
            or residual.shape != shape
            or weight.shape != shape[1:]
            or residual.dtype is not dtype
            or weight.dtype is not dtype
            or residual.get_device() != index
            or weight.get_device() != index
            or (index < 0 and not (tensor.is_cpu and residual.is_cpu and weight.is_cpu))  # on "meta", as above
        ):
            self._check_operands(tensor, residual, weight)
            bound = self._serving.fused_routes.find(key) or COMPOSED
        if out is not None and out is not tensor:
            _check_out(tensor, out)
            _check_no_overlap(out)
        if residual_out is not None and residual_out is not residual:
            _check_out(tensor, residual_out)
            _check_no_overlap(residual_out)
        if bound is not COMPOSED:
            function, session, name, _ = bound
            try:
                x, r, w, y_out, s_out = stage_operands(tensor, residual, weight, out, residual_out)
            except RuntimeError:  # a sparse tensor has no address, as above
                self._check_operands(tensor, residual, weight)
                raise
            try:
                results = function(session, x, r, w, eps, weight_offset, y_out, s_out)
            except Exception as error:  # noqa: BLE001 - plugin boundary, as above
                self._raise(error, name, "all_reduce_add_rms_norm")
            if results is not NotImplemented:
                y, s = results
                return y if out is None or y is out else copy_to_out(y, out), (
                    s if residual_out is None or s is residual_out else copy_to_out(s, residual_out)
                )
        total = self.all_reduce(tensor)
        if out is None and total.is_cuda:
            out = total  # a temporary of this call, and the norm's kernel can work in place
        return fallback.add_rms_norm(total, residual, weight, eps, weight_offset, out, residual_out)

    def _all_reduce_slow(self, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Serve a call that the hot path can't: stage its tensors through copies, or raise."""
        self._check_supported(tensor)
        if out is not None:
            _check_out(tensor, out)
            _check_no_overlap(out)
        if tensor.is_complex():
            result = torch.view_as_complex(self.all_reduce(torch.view_as_real(tensor.resolve_conj())))
        elif tensor.numel() == 0:
            # Every rank has the same empty shape, so nothing needs to be sent.
            result = torch.empty_like(tensor)
        else:
            result = self.all_reduce(to_kernel_ready(tensor))
        return copy_to_out(result, out)

    def _check_supported(self, tensor: torch.Tensor) -> None:
        """Raise if the handle is closed or the group has no route for the tensor's device, dtype and layout."""
        serving = self._serving
        if serving.failure is not None:
            raise CommError(serving.failure)
        dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
        known = tensor.device in serving.devices
        routed = (tensor.get_device(), dtype) in serving.eager.all_reduce.entries
        if known and routed and tensor.layout is torch.strided:
            return
        if not known:
            names = ", ".join(sorted(map(str, serving.devices)))
            raise ValueError(
                f"a tensor on {tensor.device} can't be reduced in {serving.title}, which serves tensors on {names}. To "
                "serve both CPU and CUDA tensors, create the group with backend='cpu:gloo,cuda:nccl'"
            )
        raise TypeError(
            f"a tensor of {tensor.dtype} and {tensor.layout} can't be reduced: {_UNSUPPORTED}; convert it first"
        )

    def _check_operands(self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """Raise if a fused call's inputs don't match each other, or the group has no route for one of them."""
        shape, dtype = tensor.shape, tensor.dtype
        if len(shape) != 2 or residual.shape != shape or weight.shape != shape[1:]:
            raise ValueError(
                "expected tensor and residual [num_tokens, hidden_size], weight [hidden_size]; got "
                f"{list(shape)}, {list(residual.shape)} and {list(weight.shape)}"
            )
        if not residual.dtype == weight.dtype == dtype or not dtype.is_floating_point:
            raise TypeError(f"expected one floating dtype; got {dtype}, {residual.dtype} and {weight.dtype}")
        self._check_supported(tensor)
        if not tensor.device == residual.device == weight.device:
            raise ValueError(f"expected one device; got {tensor.device}, {residual.device} and {weight.device}")
        for other in (residual, weight):
            self._check_supported(other)

    def _raise(self, error: Exception, name: str, hook: str) -> NoReturn:
        """Re-raise a hook's error as a `CommError` that names the backend; after a time-out, refuse later calls."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error  # serving engines catch this type and retry with a smaller batch
        text = f"backend {name!r} of {self._serving.title} failed in {hook}: {error}"
        if isinstance(error, CommTimeoutError):
            # This rank's count of calls no longer matches its peers', so every later result could be wrong.
            self._serving.retire(f"{text}. This handle refuses further calls; close it and create a new group")
            raise CommTimeoutError(text, error.ranks) from error
        if isinstance(error, CaptureError):
            raise CaptureError(text) from error
        raise CommError(text) from error


def _check_out(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Raise if `out` differs from `tensor` in shape, dtype, device or layout."""
    if (
        out.shape != tensor.shape
        or out.dtype != tensor.dtype
        or out.device != tensor.device
        or out.layout != tensor.layout
    ):
        raise ValueError(
            "out must have the dtype, shape, layout and device of its input: "
            f"out is {out.dtype} {list(out.shape)}, {out.layout}, on {out.device}; the input is {tensor.dtype} "
            f"{list(tensor.shape)}, {tensor.layout}, on {tensor.device}"
        )


def _check_no_overlap(out: torch.Tensor) -> None:
    """Raise if elements of `out` share memory, as in an expanded tensor; `copy_` would raise only after the sends."""
    if not out.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
    ):
        raise ValueError(
            f"out, {list(out.shape)} with strides {list(out.stride())}, has several elements at one address; pass a "
            "tensor without overlap"
        )


def _is_writable(tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Return whether a hook may write to `out` directly.

    Raises:
        ValueError: `out` doesn't match `tensor`.
    """
    _check_out(tensor, out)
    return is_kernel_ready(out) and disjoint(tensor, out)
