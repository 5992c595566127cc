"""Backends with one fault each that the benchmark must catch.

A backend is faulty only for messages of `AT` bytes. Admission tests the edges of its range and not that size, so every
backend is admitted. Only the returned values are wrong; no call hangs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import comm_core as comm
import torch
from comm_bench.cases import OPS
from comm_core import fallback
from harness import install

PLAIN, FUSED, *QUANTISED = OPS
#: A size at which planted backends are faulty, and one at which they aren't, in bytes.
AT, BESIDE = 4096, 1024
MAX_NBYTES = 16384
DELAY_S = 0.02


class Session:
    """A planted backend's session."""

    def __init__(self, context: comm.GroupContext) -> None:
        self.group = context.group
        self.rank = context.rank
        self.calls = 0
        self.previous: torch.Tensor | None = None
        self.seen: set[bytes] = set()
        # By address and dtype: a tensor, kept so that its address isn't reused, and its values after the last call.
        self.memory: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}


@dataclasses.dataclass
class Call:
    """One call of `AT` bytes, and its correct result."""

    session: Session
    tensor: torch.Tensor
    out: torch.Tensor | None
    total: torch.Tensor


@dataclasses.dataclass
class FusedCall:
    """One fused call of `AT` bytes: its two results, the sum over ranks, and the weight."""

    normed: torch.Tensor
    summed: torch.Tensor
    total: torch.Tensor
    weight: torch.Tensor


@dataclasses.dataclass
class QuantisedCall:
    """One quantised call of `AT` bytes, and its results."""

    quant: str
    scale: torch.Tensor
    values: torch.Tensor
    summed: torch.Tensor


class Honest:
    """Sums with Gloo. The other backends derive from it and add a fault."""

    COMM_HOOK_API = (1, 0)
    dtypes: tuple[str, ...] | None = ("bfloat16", "int8")
    max_nbytes = MAX_NBYTES

    def __init__(self, name: str) -> None:
        self.name = name

    @comm.hookimpl
    def is_available(self, topology: comm.Topology) -> comm.Available:
        assert topology.one_host
        return comm.Available(900, self.ranges())

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Session:
        assert context.world_size == topology.world_size
        return Session(context)

    def ranges(self) -> tuple[comm.Range, ...]:
        return (comm.Range(PLAIN, dtypes=self.dtypes, max_nbytes=self.max_nbytes),)

    @comm.hookimpl
    def all_reduce(self, session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if tensor.nbytes != AT:
            return fallback.torch_distributed(session.group, tensor, out)
        session.calls += 1
        return self.sum(session, tensor, out)

    def sum(self, session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        total = fallback.torch_distributed(session.group, tensor, None)
        self.spoil(Call(session, tensor, out, total))
        return total if out is None else out.copy_(total)

    def spoil(self, call: Call) -> None:
        """Change the result; a faulty backend overrides this."""


class EveryDtype(Honest):
    dtypes = None


class Delayed(Honest):
    def spoil(self, call: Call) -> None:
        if call.session.rank == 1:
            time.sleep(DELAY_S)


class OneElement(Honest):
    def spoil(self, call: Call) -> None:
        if call.session.rank == 1:
            call.total[call.total.numel() // 2] += 1


class LastElement(Honest):
    def spoil(self, call: Call) -> None:
        if call.session.rank == 0:
            call.total[-1] += 1


class EveryThirdCall(Honest):
    def spoil(self, call: Call) -> None:
        if call.session.calls % 3 == 0:
            call.total[0] += 1


class InPlace(Honest):
    def spoil(self, call: Call) -> None:
        if call.out is not None:
            call.total[0] += 1


class OutOfPlace(Honest):
    def spoil(self, call: Call) -> None:
        if call.out is None:
            call.total[0] += 1


class OutMissed(Honest):
    """In place, leaves one vector of old values in the output."""

    def spoil(self, call: Call) -> None:
        if call.out is not None:
            call.total[:8] = call.tensor[:8]


class OnlyLate(Honest):
    """Is correct until only timed calls remain."""

    def spoil(self, call: Call) -> None:
        if call.session.calls > 60:
            call.total[0] += 1


class Unmoved(Honest):
    """Doesn't sum data that it has summed before."""

    def spoil(self, call: Call) -> None:
        data = bytes(call.tensor.view(torch.uint8).tolist())
        if data in call.session.seen:
            call.total.copy_(call.tensor)
        call.session.seen.add(data)


class Cached(Honest):
    """Returns the previous call's result."""

    def spoil(self, call: Call) -> None:
        correct = call.total.clone()
        if call.session.previous is not None and call.session.previous.dtype == call.total.dtype:
            call.total.copy_(call.session.previous)
        call.session.previous = correct


class Early(Honest):
    """Reads its input too early: the values in memory at the end of the previous call."""

    after = 0

    def sum(self, session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        key = tensor.data_ptr(), tensor.dtype
        early = session.memory[key][1] if key in session.memory and session.calls > self.after else tensor
        total = fallback.torch_distributed(session.group, early, None)
        result = total if out is None else out.copy_(total)
        session.memory[key] = (tensor, tensor)
        session.memory = {key: (live, live.clone()) for key, (live, _) in session.memory.items()}
        return result


class EarlyLate(Early):
    """Like `Early`, but only once only timed calls remain."""

    after = 60


class RaisesInPlace(Honest):
    def spoil(self, call: Call) -> None:
        if call.session.rank == 1 and call.out is not None:
            raise ArithmeticError("an illegal access")


class Fused(Honest):
    """Serves the fused operation too."""

    dtypes = ("bfloat16",)

    def ranges(self) -> tuple[comm.Range, ...]:
        return tuple(comm.Range(op, dtypes=self.dtypes, max_nbytes=self.max_nbytes) for op in (PLAIN, FUSED))

    @comm.hookimpl
    def all_reduce_add_rms_norm(
        self,
        session: Session,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = fallback.torch_distributed(session.group, tensor, None)
        found = fallback.add_rms_norm(total, residual, weight, eps, weight_offset, out, residual_out)
        if tensor.nbytes == AT:
            self.spoil_fused(FusedCall(*found, total, weight))
        return found

    def spoil_fused(self, call: FusedCall) -> None:
        """Change the results; a faulty backend overrides this."""


class WrongResidual(Fused):
    def spoil_fused(self, call: FusedCall) -> None:
        call.summed[-1, -1] += 1


class ResidualLeftOut(Fused):
    """Adds the residual before the norm, but returns the sum without it."""

    def spoil_fused(self, call: FusedCall) -> None:
        call.summed.copy_(call.total)


class WrongNorm(Fused):
    def spoil_fused(self, call: FusedCall) -> None:
        call.normed[0, 0] *= 2


class WeightLeftOut(Fused):
    def spoil_fused(self, call: FusedCall) -> None:
        call.normed.div_(call.weight)


class Quantised(Fused):
    """Serves the quantised operation too."""

    def ranges(self) -> tuple[comm.Range, ...]:
        quantised = comm.Range("all_reduce_add_rms_norm_quant", dtypes=self.dtypes, max_nbytes=self.max_nbytes)
        return (*super().ranges(), quantised)

    @comm.hookimpl
    def all_reduce_add_rms_norm_quant(
        self,
        session: Session,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        quant: str,
        scale: torch.Tensor,
        out: torch.Tensor,
        residual_out: torch.Tensor,
        norm_out: torch.Tensor | None,
    ) -> None:
        total = fallback.torch_distributed(session.group, tensor, None)
        normed, _ = fallback.add_rms_norm(total, residual, weight, eps, weight_offset, norm_out, residual_out)
        fallback.quantize(normed, quant, scale, out)
        if tensor.nbytes == AT:
            self.spoil_quantised(QuantisedCall(quant, scale, out, residual_out))

    def spoil_quantised(self, call: QuantisedCall) -> None:
        """Change the results; a faulty backend overrides this."""


class OneStepOff(Quantised):
    """Rounds one value to a neighbour."""

    def spoil_quantised(self, call: QuantisedCall) -> None:
        call.values.view(torch.uint8)[-1, -1] ^= 1


class WrongScale(Quantised):
    """Returns a wrong scale where it isn't given."""

    def spoil_quantised(self, call: QuantisedCall) -> None:
        if call.quant != "fp8_static":
            call.scale[-1, -1] *= 1.2


class WrongQuantisedSum(Quantised):
    def spoil_quantised(self, call: QuantisedCall) -> None:
        call.summed[0, 0] += 1


class CannotPrepare(Fused):
    """Serves fused calls only once prepared, which fails on one rank."""

    def ranges(self) -> tuple[comm.Range, ...]:
        return (comm.Range(FUSED, dtypes=self.dtypes, max_nbytes=self.max_nbytes, prepared=True),)

    @comm.hookimpl
    def pre_capture_init(self, session: Session, shapes: comm.Shapes) -> Sequence[comm.Range]:
        if session.rank == 1:
            raise MemoryError(f"no room for {shapes.max_tokens} tokens")
        return self.ranges()


def plant(folder: Path, kinds: Sequence[type[Honest]]) -> list[Path]:
    """Install these as backends named like their classes, in lower case."""
    return [install(folder / kind.__name__, name_of(kind), source(kind)) for kind in kinds]


def name_of(kind: type[Honest]) -> str:
    return kind.__name__.lower()


def source(kind: type[Honest]) -> str:
    return f"import {kind.__module__} as kinds\n\nplugin = kinds.{kind.__name__}({name_of(kind)!r})\n"
