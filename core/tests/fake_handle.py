"""A handle in one process, whose backends are fakes that hold it to the hooks' contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from comm_core._handle import fallback, quant
from comm_core._handle.backend import Backend
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core._plan.decide import Slate
from comm_core._plan.routes import Offer
from comm_core._plugins.discovery import Plugin
from comm_core.topology import Host, RankInfo, Topology
from comm_core.types import OPS, TERMINAL, Range

ALL_REDUCE, FUSED, QUANT = OPS
TITLE = "group 'tp' (ranks 0-1)"


def is_plain(tensor: torch.Tensor) -> bool:
    """What hooks may rely on: contiguous, aligned to 16 bytes, not empty, not a negated view."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0 and not tensor.is_neg()


def disjoint(one: torch.Tensor, other: torch.Tensor) -> bool:
    first, second = one.data_ptr(), other.data_ptr()
    return first + one.nbytes <= second or second + other.nbytes <= first


class Fake:
    """A backend of two ranks with equal tensors: every sum is twice the tensor.

    Its hooks hold their caller to the contract.

    Attributes:
        fit: checks the operands of a fused call, as `are_operands` in operands.h; None: core validates them.
        declined: fused calls with operands that broke the hook's preconditions.
        refused_forms: the quantised forms that it declines.
    """

    fit: ClassVar[Callable[..., bool] | None] = None
    refused_forms: Sequence[str] = ()

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []
        self.declined = 0

    def all_reduce(self, session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        self.calls.append((session, tensor, out))
        assert is_plain(tensor)
        if out is not None:
            assert is_plain(out)
            assert (out.shape, out.dtype, out.device) == (tensor.shape, tensor.dtype, tensor.device)
            assert out is tensor or disjoint(out, tensor)
        if self.error is not None:
            raise self.error
        return torch.add(tensor, tensor, out=out)

    def fused(self, session: object, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tensor, residual, weight, eps, offset, out, residual_out = arguments
        if self.fit is not None:
            y, s = (torch.empty_like(t) if o is None else o for t, o in ((tensor, out), (residual, residual_out)))
            if not self.fit(tensor, residual, weight, y, s):
                self.declined += 1
                return NotImplemented
            if weight.requires_grad:
                weight = weight.detach()
        self.calls.append((session, tensor, residual, weight, eps, offset, out, residual_out))
        assert all(map(is_plain, (tensor, residual, weight)))
        for target, itself in ((out, tensor), (residual_out, residual)):
            if target is not None:
                assert is_plain(target)
                assert target.shape == tensor.shape
                others = [t for t in (tensor, residual, weight) if not (t is itself and t is target)]
                assert all(disjoint(target, other) for other in others)
        assert out is None or residual_out is None or disjoint(out, residual_out)
        if self.error is not None:
            raise self.error
        # As a kernel might: the results are written before the inputs are read again.
        normed, summed = fallback.add_rms_norm(2 * tensor, residual, weight, eps, offset, None, None)
        return (
            normed if out is None else out.copy_(normed),
            summed if residual_out is None else residual_out.copy_(summed),
        )

    def quant(self, session: object, *arguments: Any) -> Any:
        tensor, residual, weight, eps, offset, form, scale, out, residual_out, norm_out = arguments
        if form in self.refused_forms:
            return NotImplemented
        self.calls.append((session, *arguments))
        assert all(map(is_plain, (tensor, residual, weight)))
        assert (out.dtype, out.shape) == (torch.float8_e4m3fn, tensor.shape)
        written = [out, residual_out]
        inputs = [tensor, residual, weight]
        if form == "fp8_static":
            assert scale.numel() == 1
            inputs.append(scale)
        else:
            num_tokens, columns = scale.shape
            assert columns == (1 if form == "fp8_per_token" else tensor.shape[1] / 128)
            assert scale.data_ptr() % 16 == 0
            assert scale.is_contiguous() or (scale.stride(0) == 1 and scale.stride(1) >= num_tokens)
            written.append(
                scale.as_strided(
                    (1 + sum((n - 1) * s for n, s in zip(scale.shape, scale.stride(), strict=True)),), (1,)
                )
            )
        if norm_out is not None:
            assert norm_out.shape == tensor.shape
            written.append(norm_out)
        assert all(item.is_contiguous() and item.data_ptr() % 16 == 0 and not item.is_neg() for item in written)
        assert not scale.is_neg()
        for index, target in enumerate(written):
            own = {id(residual_out): residual, id(norm_out): tensor}.get(id(target))
            assert all(disjoint(target, other) for other in written[index + 1 :])
            assert all(disjoint(target, other) for other in inputs if other is not own or target is not own)
        if self.error is not None:
            raise self.error
        normed, summed = fallback.add_rms_norm(2 * tensor, residual, weight, eps, offset, None, None)
        residual_out.copy_(summed)
        if norm_out is not None:
            norm_out.copy_(normed)
        quant.quantize_by_torch(normed, form, scale, out)
        return None

    def hooks(self) -> dict[str, Callable[..., Any]]:
        return {ALL_REDUCE: self.all_reduce, FUSED: self.fused, QUANT: self.quant}


def handle(made: Sequence[Offer], fakes: Mapping[str, Fake], wire: str = "", **hooks: Callable[..., Any]) -> Backend:
    """A handle whose sessions are named after their backends; `fakes` has the terminal fallback's, too."""
    sessions = {
        offer.name: Session(
            Plugin(offer.name, None, None, {**fakes[offer.name].hooks(), **hooks}),
            f"session of {offer.name}",
            cast("Any", None),
            checks_operands=Fake.fit is not None,
        )
        for offer in made
    }
    topology = Topology.of([RankInfo(rank, Host("node", "id")) for rank in range(2)])
    terminal = (fakes[TERMINAL].all_reduce, "the process group")
    decision = Slate(tuple(made), wire=wire).decision(("cpu",))
    return Backend(Serving(decision, topology, TITLE, torch.device("cpu"), terminal, sessions))


def one_backend(
    *ranges: Range, error: BaseException | None = None, wire: str = "", **hooks: Callable[..., Any]
) -> tuple[Backend, Fake, Fake]:
    """A handle with the backend "fast", its fake and the terminal fallback's."""
    fast, last = Fake(error), Fake()
    made = [Offer("fast", 300, ranges or tuple(map(Range, OPS)))]
    return handle(made, {"fast": fast, TERMINAL: last}, wire, **hooks), fast, last


def aligned(numel: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    """Numbers from 1 on, `offset` elements after an address that is a multiple of 64 bytes."""
    room = torch.zeros((numel + offset) * dtype.itemsize + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    tensor = room[start : start + (numel + offset) * dtype.itemsize].view(dtype)[offset:]
    return tensor.copy_(torch.arange(1, numel + 1) % 50)


def fused_inputs() -> dict[str, torch.Tensor]:
    """Three inputs of a fused call and two outputs, apart from each other."""
    return {
        "x": aligned(32).view(4, 8),
        "residual": aligned(32).view(4, 8) + 3,
        "weight": aligned(8),
        "new": torch.empty(4, 8),
        "other": torch.empty(4, 8),
    }
