"""The handle of a group: it routes each call to the backend that the ranks agreed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch.utils import _python_dispatch

from comm_core._control.deadline import raises_interrupts
from comm_core._handle.operands import TENSOR_TYPES, is_writable
from comm_core._handle.quant_calls import QuantCalls
from comm_core.errors import CommError
from comm_core.types import DTYPES, Decision, RouteStats, WaitStats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from comm_core.tokens import TokenCounts
    from comm_core.topology import Topology
    from comm_core.tuning import VariantChoice

__all__ = ["Backend"]

_Tensor = torch.Tensor
# CPU memory lies above; a "meta" tensor's address, its offset from 0 in bytes, doesn't.
_LOW_ADDRESSES = 1 << 40


class Backend(QuantCalls):
    """All-reduce for one process group; `comm_core.get_backend` returns it.

    `all_reduce` and the two fused operations are Collective: every rank of the group makes the same calls in the same
    order, with tensors of the same shape and dtype. Results carry no gradient. Only one thread may use a handle at a
    time, and only in the process that got it: it can't be pickled, and a deep copy of a handle is the handle itself.

    Attributes:
        group_name: the name of the process group, by which `torch.ops.comm_core` finds this handle; "" without a
            process group.
    """

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
        """The reason why every call raises until `comm_core.recover`; None while the handle is sound."""
        return self._serving.failure

    def all_reduce(
        self,
        tensor: torch.Tensor,
        out: torch.Tensor | None = None,
        num_tokens: TokenCounts | torch.Tensor | None = None,  # keyword-only, it would cost every call 50 ns
    ) -> torch.Tensor:
        """Sum `tensor` over the ranks of the group, elementwise.

        Args:
            tensor: any shape, also empty; one of the dtypes in `comm_core.types.DTYPES`, or complex. A tensor that
                isn't contiguous, or isn't aligned to 16 bytes, is copied first.
            out: the tensor that receives the sum, with the shape, dtype and device of `tensor`. Pass `tensor` itself to
                reduce in place. None allocates a new tensor.
            num_tokens: the batch's real rows, the first of `[..., hidden_size]`, which kernels read on the device as
                they run; see `TokenCounts`, or its `total`. The same on every rank; `bucket` is the number of all rows.
                The rows of padding are unspecified in the result. None: all rows are real.

        Returns:
            `out`, or a new contiguous tensor.

        Raises:
            TypeError: an operand isn't a tensor or has no memory, or neither a backend nor torch.distributed sums its
                dtype or layout; raised alike on all ranks, before anything is sent.
            ValueError: the group doesn't serve the tensor's device, or `out` doesn't match `tensor` or overlaps
                itself, or `num_tokens` doesn't match `tensor`; raised alike on all ranks, before anything is sent.
            CommTimeoutError: a peer didn't join the call in time. Every later call on this handle raises `CommError`.
            CaptureError: a stream captures, and this call can't be captured yet; the text names the call to make
                before the capture.
            CommError: the handle is closed, the backend failed, or two threads called at once; the text names the
                group or the backend. Every later call raises, too, and the peers' calls raise soon. Or the group is
                suspended, until `comm_core.resume`.
        """
        # Only the slow path looks into what intercepts operators in this thread: asking torch takes 40 ns.
        if (
            num_tokens is not None or tensor.__class__ is not _Tensor or _python_dispatch._is_in_torch_dispatch_mode  # noqa: SLF001
        ):
            return self._all_reduce_slow(tensor, out, num_tokens)
        try:
            index, address, contiguous = tensor.get_device(), tensor.data_ptr(), tensor.is_contiguous()
        except RuntimeError:  # a sparse tensor has no address; checking the layout first costs every call 50 ns
            return self._all_reduce_slow(tensor, out)
        # An empty tensor has address 0. Tensors on the device "meta" have the CPU's index, -1.
        if (
            address & 15
            or not contiguous
            or not address
            or (index < 0 and address < _LOW_ADDRESSES and not tensor.is_cpu)
            or (out is not None and out is not tensor and not is_writable(index, tensor, out))
        ):
            return self._all_reduce_slow(tensor, out)
        key = (index, tensor.dtype, tensor.numel())
        # As in `_run`, whose call would take as long as the rest of this method.
        serving = self._idle
        self._idle = self._in_use
        try:
            bound = serving.all_reduce_routes[key]
            if bound is not None:
                function, session, name, _, counter = bound
                for _counted in counter:  # counts the call; see `CallCounter`
                    break
                try:
                    return function(session, tensor, out)  # type: ignore[no-any-return]
                except BaseException as error:  # noqa: BLE001 - plugin boundary: re-raised with the backend's name
                    self._stop(error, name, "all_reduce")
        finally:
            self._idle = serving
        return self._all_reduce_slow(tensor, out)

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
        """Sum `tensor` over the ranks, add the residual, and normalise the result with RMSNorm.

        Computes `s = sum over ranks of tensor + residual` and `y = s · rsqrt(mean(s², last axis) + eps) · (weight +
        weight_offset)`. One fused kernel serves the call if a backend offers one for this shape; otherwise, and for
        inputs of two dtypes or without a residual, core composes it of an all-reduce and a norm.

        Args:
            tensor: `[num_tokens, hidden_size]`, or `[..., hidden_size]` with any number of dimensions before; floating
                point.
            residual: like `tensor`, or float32 beside a 16-bit tensor; the same values on every rank. None: there is
                none, as in a model's first layer, and `s` is the sum over the ranks alone.
            weight: `[hidden_size]`, the dtype of `tensor`, or float32 beside a 16-bit tensor; the same values on every
                rank.
            eps: added to the mean square.
            weight_offset: added to the weight, 1.0 for Gemma's norms.
            out: the tensor that receives `y`, like `tensor`; it may be `tensor` itself. None allocates a new tensor.
            residual_out: the tensor that receives `s`, like `residual`, or like `tensor` without one. Pass `residual`
                itself to update it in place. None allocates a new tensor.
            num_tokens: as in `all_reduce`, for all results.

        Returns:
            `(y, s)`: `out` and `residual_out`, or the new tensors.

        Raises:
            TypeError: as in `all_reduce`, or the operands' dtypes don't match or aren't floating point.
            ValueError: as in `all_reduce`, or the operands' shapes or devices don't match, or `out` and `residual_out`
                share memory.
            CommTimeoutError: as in `all_reduce`.
            CaptureError: as in `all_reduce`.
            CommError: as in `all_reduce`.
        """
        key = bound = None
        # As in `all_reduce`.
        if num_tokens is None and tensor.__class__ is _Tensor and not _python_dispatch._is_in_torch_dispatch_mode:  # noqa: SLF001
            key = (tensor.get_device(), tensor.dtype, tensor.shape)
            bound = self._idle.fused_routes.get(key)
            if (
                bound is not None
                and bound[3]
                and residual.__class__ in TENSOR_TYPES
                and weight.__class__ in TENSOR_TYPES
                and (out is None or (out is not residual_out and out.__class__ in TENSOR_TYPES))
                and (residual_out is None or residual_out.__class__ in TENSOR_TYPES)
            ):
                function, session, name, _, counter = bound
                serving = self._idle
                self._idle = self._in_use
                if serving is self._in_use:
                    self._in_use.refuse()
                try:
                    results = function(session, tensor, residual, weight, eps, weight_offset, out, residual_out)
                except BaseException as error:  # noqa: BLE001 - plugin boundary, as above
                    if isinstance(error, Exception):
                        self._check_operands(tensor, residual, weight, out, residual_out)
                    self._stop(error, name, "all_reduce_add_rms_norm")
                finally:
                    self._idle = serving
                if results is not NotImplemented:
                    for _counted in counter:
                        break
                    return results  # type: ignore[no-any-return]
        return self._fused_slow(key, bound, tensor, residual, weight, eps, weight_offset, out, residual_out, num_tokens)

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
        """Sum over the ranks, add the residual, normalise, and quantise the norm to FP8.

        `y` and `s` are those of `all_reduce_add_rms_norm`, and the quantised values have the bits of a quantisation of
        `y`, as rounded to its dtype, by vLLM's `static_scaled_fp8_quant`, `dynamic_per_token_scaled_fp8_quant` or
        `per_token_group_quant_fp8`: in float32, saturated at ±448, rounded to the nearest. A NaN stays a NaN, and
        doesn't count for a scale. One fused kernel serves the call if a backend offers one for this shape; otherwise
        core composes it.

        Args:
            tensor: as in `all_reduce_add_rms_norm`.
            residual: as in `all_reduce_add_rms_norm`.
            weight: as in `all_reduce_add_rms_norm`.
            eps: added to the mean square.
            weight_offset: added to the weight.
            quant: "fp8_static": `y / scale`, with the scale given; "fp8_per_token": a scale for each row, the row's
                largest magnitude / 448; "fp8_per_group": likewise for each 128 elements of a row, where `hidden_size`
                is a multiple of 128.
            scale: float32. For "fp8_static", the scale: one element, the same value on every rank. Otherwise the tensor
                that receives the scales, `[..., 1]` or `[..., hidden_size / 128]`, with any strides; None allocates it.
            column_major_scales: whether new scales for groups are column-major, as DeepGEMM takes them: the stride of
                rows is 1, and that of columns the number of rows, rounded up to a multiple of 4.
            with_norm: whether to return `y`, too.
            out: the tensor that receives the quantised values: float8_e4m3fn, the shape of `tensor`. None allocates it.
            residual_out: the tensor that receives `s`, as in `all_reduce_add_rms_norm`.
            norm_out: the tensor that receives `y`, like `tensor`; it may be `tensor` itself. None allocates it if
                `with_norm` is set.
            num_tokens: as in `all_reduce`, for all results.

        Returns:
            The quantised values, their scales or the scale, `s`, and `y`, or None if it isn't asked for: the tensors
            that were given, or new ones.

        Raises:
            TypeError: as in `all_reduce_add_rms_norm`, or "fp8_static" got no scale.
            ValueError: as in `all_reduce_add_rms_norm`, or `quant` isn't one of `comm_core.types.QUANTS`, `hidden_size`
                isn't a multiple of 128 as its groups need, `scale` or `out` has another dtype, shape or device, or two
                outputs share memory.
            CommTimeoutError: as in `all_reduce`.
            CaptureError: as in `all_reduce`.
            CommError: as in `all_reduce`.
        """
        return self._quant_call(
            *(tensor, residual, weight, eps, weight_offset, quant, scale, column_major_scales, with_norm),
            *(out, residual_out, norm_out, num_tokens),
        )

    @raises_interrupts
    def check(self) -> None:
        """Raise the errors that kernels have reported since the last call, such as a peer that timed out in a replay.

        Local. A replay of a captured graph can't raise by itself, so call this after replays. It reads one word of host
        memory for each session, and once a second at most the job's store, for the failures of other ranks.

        Raises:
            CommTimeoutError: a kernel gave up waiting for a peer, so earlier results are wrong; the text names the
                backend.
            CommError: another fault makes earlier results wrong, another rank's handle stopped after a failure, or
                this handle is closed. Or a graph was replayed that was captured before `comm_core.recover`: then its
                results are wrong, and the handle goes on.
        """
        serving = self._serving
        serving.check_peers()
        if serving.failure is not None:
            raise CommError(serving.failure)
        found = self._checker.find_failure(serving.all_sessions)
        if found is not None:
            name, error = found
            self._stop(error, name, "check")
        found = self._checker.find_failure(serving.dropped_sessions)
        if found is not None:
            raise CommError(serving.describe_replay(*found)) from found[1]

    def limits(self) -> dict[str, dict[str, float]]:
        """Measure the lower bounds on each backend's time on this machine, in some tenths of a second. Collective.

        Returns:
            By backend, the times in microseconds by a description of each bound; backends without the hook `limits`
            are left out.

        Raises:
            CommError: the handle is closed or suspended, or has stopped after a failure.
            Exception: a backend's hook raised.
        """
        self._require_open()
        return {
            name: session.plugin.hooks["limits"](session.value)
            for name, session in self._serving.sessions.items()
            if session.plugin.has("limits")
        }

    @raises_interrupts
    def variants(self, op: str, nbytes: int, num_tokens: int = 0) -> dict[str, tuple[str, ...]]:
        """Return the variants by which each backend can serve a message, the one in use first. Local.

        Args:
            op: one of `comm_core.types.OPS`.
            nbytes: the size of the tensor to be reduced, in bytes.
            num_tokens: the number of its rows, fused operations only.

        Raises:
            CommError, Exception: as in `limits`.
        """
        self._require_open()
        found = {name: session.variants(op, nbytes, num_tokens) for name, session in self._serving.sessions.items()}
        return {name: texts for name, texts in found.items() if texts}

    @raises_interrupts
    def use_variants(self, choices: Mapping[str, Sequence[VariantChoice]]) -> None:
        """Let backends serve by these choices among their variants, in place of earlier choices.

        Local; every rank makes it with equal choices, between the same two calls. Captured graphs stay as they are.

        Args:
            choices: by backend, for messages that don't overlap, sizes ascending; () for its own table.

        Raises:
            LookupError: a backend has no session in this group, or no variants.
            ValueError: a backend has no such variant.
            CommError: as in `limits`.
        """
        self._require_open()
        for name, of_backend in choices.items():
            session = self._serving.sessions.get(name)
            if session is None or not session.plugin.has("use_variants"):
                raise LookupError(f"backend {name!r} has no variants in {self._serving.title}")
            session.use_variants(of_backend)

    def stats(self) -> tuple[RouteStats, ...]:
        """Return the numbers of this rank's calls so far, one entry for each route, backend and wire.

        Local; also of a closed handle. A call that a stream captures counts once, its replays don't; one that is
        recorded outside `comm_core.capture` counts as eager. A fused call that core composes counts as one of
        "torch_distributed", and its all-reduce for the backend that serves it.
        """
        return self._serving.stats()

    def waits(self) -> tuple[WaitStats, ...]:
        """Return how long this rank has waited for each peer so far, one entry for each backend and awaited peer.

        Local; waits for no kernel. A peer that others wait for is late to the calls. Kernels' waits count once they
        have ended, in replays of graphs, too. Only backends with the hook `waits` are listed, until the handle closes.

        Raises:
            Exception: a backend's hook raised.
        """
        return self._serving.waits()

    def explain(self) -> str:
        """Return a report of the group's decision.

        It lists every candidate with its verdict and reason, and for each kind of message the backends that serve it,
        equal on every rank; then this rank's calls so far, if there were some, and its waits: see `stats` and `waits`.
        """
        from comm_core._plan.explain import explain

        stats = self.stats()
        return explain(self._serving.label, self.topology, self.decision, stats, self.waits() if stats else ())

    def __repr__(self) -> str:
        return f"<comm_core.Backend {self.name!r} of {self._serving.label}>"

    def __copy__(self) -> Backend:
        return self

    def __deepcopy__(self, _memo: object) -> Backend:
        """Return the handle itself: a copied module calls the same group."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the handle of {self._serving.title} can't be pickled: it belongs to this process. Leave it out of what "
            "is saved or sent, and call comm.get_backend(group) in the process that needs it"
        )
