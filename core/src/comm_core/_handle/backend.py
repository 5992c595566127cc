"""The handle that a caller holds: routes each call to the hook that the group agreed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from comm_core._handle import fallback
from comm_core._handle.lookup import COMPOSED, Kind, Served
from comm_core._handle.operands import OWN, delivered, disjoint, has_memory, operands, plain, plain_copy
from comm_core.errors import CaptureError, CommError, CommTimeoutError
from comm_core.types import DTYPES, Decision

if TYPE_CHECKING:
    from comm_core._handle.serving import Serving
    from comm_core.topology import Topology

__all__ = ["Backend"]

_REFUSED = "float8, booleans, unsigned integers above 8 bits, sparse and quantised tensors aren't summed"


class Backend:
    """All-reduce for one process group; `comm_core.get_backend` makes it.

    Calls are Collective: every rank of the group makes the same calls in the same order, with tensors of the same shape
    and dtype. Nothing is differentiated. A handle is for one thread at a time.

    Attributes:
        group_name: the process group's, by which `torch.ops.comm_core` finds this handle; "" for a process alone.
    """

    def __init__(self, serving: Serving, group_name: str = "") -> None:
        self.group_name = group_name
        self._serving = serving

    @property
    def name(self) -> str:
        """The backend that serves the smallest eager float32 message."""
        route = self.decision.route("all_reduce", "eager", self.topology.device_types[0], "float32")
        return route.backend_for(DTYPES["float32"])

    @property
    def decision(self) -> Decision:
        """What the ranks agreed on, equal on all of them."""
        return self._serving.decision

    @property
    def topology(self) -> Topology:
        """What the ranks reported, from which they decided."""
        return self._serving.topology

    @property
    def device(self) -> torch.device:
        """Where the group's main tensors live."""
        return self._serving.device

    @property
    def failure(self) -> str | None:
        """Why every call raises; None while the handle serves."""
        return self._serving.failure

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sum `tensor` over the ranks of the group, elementwise.

        Args:
            tensor: any shape, also empty; the dtypes of `comm_core.types.DTYPES` and complex ones.
            out: where the sum goes: a tensor of the same shape, dtype and device, `tensor` itself for in place.
                None: a new one.

        Returns:
            `out`, or a new contiguous tensor.

        Raises:
            TypeError, ValueError: a dtype, device or `out` that no backend takes, or a tensor without memory, such as a
                `FakeTensor`; alike on all ranks, before anything is sent.
            CommError: the backend that serves this message failed, or the handle is closed; the text names it. As
                `CommTimeoutError` where a peer didn't come, as `CaptureError` where the call can't be captured yet.
        """
        index = tensor.get_device()
        try:
            kind, address, contiguous = (index, tensor.dtype, tensor.nbytes), tensor.data_ptr(), tensor.is_contiguous()
        except RuntimeError:  # a sparse tensor has none, and a look at every tensor's layout costs each call 50 ns
            return self._reduce_odd(tensor, out)
        # An empty tensor's address is 0. Tensors on torch's device "meta" have the CPU's index.
        if address & 15 or not contiguous or not address or (index < 0 and not tensor.is_cpu):
            return self._reduce_odd(tensor, out)
        if tensor.__class__ not in OWN and not has_memory(tensor):
            return self._reduce_odd(tensor, out)
        if out is not None and out is not tensor and not _fits(tensor, out):
            return self._reduce_odd(tensor, out)
        routes = self._serving.plain
        served = routes.get(kind) or routes.find(kind)
        if served is None:
            return self._reduce_odd(tensor, out)
        function, session, name, _ = served
        try:
            return function(session, tensor, out)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - the plugin border: it is told by name
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
        """`s = sum over ranks of tensor + residual` and `s · rsqrt(mean(s²) + eps) · (weight + weight_offset)`.

        One fused call where a backend offers it, else an all-reduce and a norm. The formula is that of the hook of the
        same name.

        Args:
            tensor: `[num_tokens, hidden_size]`, floating point.
            residual: like `tensor`; the same values on every rank.
            weight: `[hidden_size]`, the dtype of `tensor`; the same values on every rank.
            eps: added to the mean square.
            weight_offset: added to the weight, 1.0 for Gemma's norms.
            out: where the normed values go, like `tensor`; None: a new one.
            residual_out: where the sum goes, like `tensor`, `residual` itself for in place; None: a new one.

        Returns:
            The normed values and the sum.

        Raises:
            ValueError: shapes that don't fit each other.
            CommError: and all else that `all_reduce` raises, for the same reasons.
        """
        kind = (tensor.get_device(), tensor.dtype, tensor.shape)
        served = self._serving.fused.get(kind)
        if served is not None:
            function, session, name, checks_operands = served
            if (
                checks_operands
                and tensor.__class__ in OWN
                and residual.__class__ in OWN
                and weight.__class__ in OWN
                and (out is None or out.__class__ in OWN)
                and (residual_out is None or residual_out.__class__ in OWN)
            ):
                try:
                    results = function(session, tensor, residual, weight, eps, weight_offset, out, residual_out)
                except Exception as error:  # noqa: BLE001 - the plugin border, as above
                    self._check_operands(tensor, residual, weight)
                    for each in (out, residual_out):
                        if each is not None:
                            _check_out(tensor, each)
                    self._raise(error, name, "all_reduce_add_rms_norm")
                if results is not NotImplemented:
                    return results  # type: ignore[no-any-return]
        return self._fuse(kind, served, tensor, residual, weight, eps, weight_offset, out, residual_out)

    def check(self) -> None:
        """Raise what the devices noted since the last call, such as a replayed wait that ended without its peer.

        Local. Reads one word a session from the host's memory; call it after replays of a captured graph.

        Raises:
            CommTimeoutError, CommError: earlier results are wrong; the text names the backend.
        """
        if self.failure is not None:
            raise CommError(self.failure)
        for session in self._serving.all_sessions:
            hook = session.plugin.hooks.get("check")
            if hook is not None:
                try:
                    hook(session.value)
                except Exception as error:  # noqa: BLE001 - the plugin border, as above
                    self._raise(error, session.plugin.name, "check")

    def limits(self) -> dict[str, dict[str, float]]:
        """What bounds each backend on this machine, in microseconds, by backend and by a description. Collective."""
        return {
            name: session.plugin.hooks["limits"](session.value)
            for name, session in self._serving.sessions.items()
            if session.plugin.has("limits")
        }

    def explain(self) -> str:
        """Who serves what in this group and why the others don't: text, equal on every rank."""
        from comm_core._plan.explain import explain

        return explain(self._serving.title, self.topology, self.decision)

    def __repr__(self) -> str:
        return f"<comm_core.Backend {self.name!r} of {self._serving.title}>"

    def _fuse(
        self,
        kind: Kind,
        served: Served | None,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A fused call that no hook has taken as it is: core looks at its tensors."""
        index, dtype, shape = kind
        if (
            served is None
            or residual.shape != shape
            or weight.shape != shape[1:]
            or residual.dtype is not dtype
            or weight.dtype is not dtype
            or residual.get_device() != index
            or weight.get_device() != index
            or (index < 0 and not (tensor.is_cpu and residual.is_cpu and weight.is_cpu))  # as above
        ):
            self._check_operands(tensor, residual, weight)
            served = self._serving.fused.find(kind) or COMPOSED
        if out is not None and out is not tensor:
            _check_out(tensor, out)
            _check_elements(out)
        if residual_out is not None and residual_out is not residual:
            _check_out(tensor, residual_out)
            _check_elements(residual_out)
        if served is not COMPOSED:
            function, session, name, _ = served
            try:
                x, r, w, y_out, s_out = operands(tensor, residual, weight, out, residual_out)
            except RuntimeError:  # a sparse tensor has no address, as above
                self._check_operands(tensor, residual, weight)
                raise
            try:
                results = function(session, x, r, w, eps, weight_offset, y_out, s_out)
            except Exception as error:  # noqa: BLE001 - the plugin border, as above
                self._raise(error, name, "all_reduce_add_rms_norm")
            if results is not NotImplemented:
                y, s = results
                return y if out is None or y is out else delivered(y, out), (
                    s if residual_out is None or s is residual_out else delivered(s, residual_out)
                )
        total = self.all_reduce(tensor)
        if out is None and total.is_cuda:
            out = total  # nobody else's, and one kernel reads and writes it
        return fallback.add_rms_norm(total, residual, weight, eps, weight_offset, out, residual_out)

    def _reduce_odd(self, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Everything that the hot path leaves: staged through a copy, answered at once, or refused."""
        self._check_kind(tensor)
        if out is not None:
            _check_out(tensor, out)
            _check_elements(out)
        if tensor.is_complex():
            result = torch.view_as_complex(self.all_reduce(torch.view_as_real(tensor.resolve_conj())))
        elif tensor.numel() == 0:
            # An empty sum needs no messages: every rank has the same shape.
            result = torch.empty_like(tensor)
        else:
            result = self.all_reduce(plain_copy(tensor))
        return delivered(result, out)

    def _check_kind(self, tensor: torch.Tensor) -> None:
        """Raise why there is no route for tensors of this kind; a dtype and device of the group have one."""
        serving = self._serving
        if serving.failure is not None:
            raise CommError(serving.failure)
        dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
        known = tensor.device in serving.devices
        routed = (tensor.get_device(), dtype) in serving.eager.plain.entries
        if known and routed and tensor.layout is torch.strided:
            return
        if not known:
            names = ", ".join(sorted(map(str, serving.devices)))
            raise ValueError(
                f"a tensor on {tensor.device} can't be reduced in {serving.title}, whose tensors live on {names}. For "
                "CPU tensors beside CUDA's make the group with backend='cpu:gloo,cuda:nccl'"
            )
        raise TypeError(f"{tensor.dtype}, {tensor.layout}: {_REFUSED}; convert it first")

    def _check_operands(self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """Raise where a fused call's tensors don't belong together, or there is no route for them."""
        shape, dtype = tensor.shape, tensor.dtype
        if len(shape) != 2 or residual.shape != shape or weight.shape != shape[1:]:
            raise ValueError(
                "expected tensor and residual [num_tokens, hidden_size], weight [hidden_size]; got "
                f"{list(shape)}, {list(residual.shape)} and {list(weight.shape)}"
            )
        if not residual.dtype == weight.dtype == dtype or not dtype.is_floating_point:
            raise TypeError(f"expected one floating dtype; got {dtype}, {residual.dtype} and {weight.dtype}")
        self._check_kind(tensor)
        if not tensor.device == residual.device == weight.device:
            raise ValueError(f"expected one device; got {tensor.device}, {residual.device} and {weight.device}")
        for other in (residual, weight):
            self._check_kind(other)

    def _raise(self, error: Exception, name: str, hook: str) -> NoReturn:
        if isinstance(error, torch.OutOfMemoryError):
            raise error  # engines catch it and retry with less
        text = f"backend {name!r} of {self._serving.title} failed in {hook}: {error}"
        if isinstance(error, CommTimeoutError):
            # Its peers' counts and its own no longer match: no later call could be right.
            self._serving.retire(f"{text}. It isn't used any more; close the group's handle and make a new group")
            raise CommTimeoutError(text, error.ranks) from error
        if isinstance(error, CaptureError):
            raise CaptureError(text) from error
        raise CommError(text) from error


def _check_out(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Raise where `out` can't take what becomes of `tensor`."""
    if (
        out.shape != tensor.shape
        or out.dtype != tensor.dtype
        or out.device != tensor.device
        or out.layout != tensor.layout
    ):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, {out.layout}, on {out.device}; the tensor is {tensor.dtype} "
            f"{list(tensor.shape)}, {tensor.layout}, on {tensor.device}"
        )


def _check_elements(out: torch.Tensor) -> None:
    """Raise where several elements of `out` are one, as in an expanded tensor; a copy would, once all is sent."""
    if not out.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
    ):
        raise ValueError(f"out, {list(out.shape)} with strides {list(out.stride())}, has one element in several places")


def _fits(tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether a hook may write to `out` directly; what it can't be at all raises."""
    _check_out(tensor, out)
    return plain(out) and disjoint(tensor, out)
