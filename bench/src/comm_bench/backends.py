"""The contenders of this project: this group's backends, and torch.distributed, to which all others are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core import fallback
from comm_core.types import OPS, TERMINAL

from comm_bench.cases import GROUP_SIZE, BenchCase
from comm_bench.contenders import Contender, Job, State

if TYPE_CHECKING:
    from comm_core.tuning import VariantChoice

__all__ = ["backends", "nccl_needs_spacer", "terminal"]

# The backend that launches nothing but NCCL's kernels.
_NCCL = "nccl"


class _BackendContender(Contender):
    """A backend of comm-core, called as users do: through the handle of a group that names this backend."""

    kind = "backend"

    def __init__(self, name: str, handle: comm.Backend, group: dist.ProcessGroup) -> None:
        super().__init__(name)
        self._handle = handle
        self._group = group
        self._has_stopped = False

    def supports(self, case: BenchCase) -> bool:
        if self._has_stopped:
            return False
        owners = (self._owner(op, case) for op in reversed(OPS[: OPS.index(_hook(case)) + 1]))
        return next((owner for owner in owners if owner != TERMINAL), TERMINAL) == self.name

    def composes(self, case: BenchCase) -> bool:
        return case.fused and self._owner(_hook(case), case) == TERMINAL

    def _owner(self, op: str, case: BenchCase) -> str:
        """Return the backend that serves core's operation `op` of the case's size in the handle's plan."""
        sizes = (case.nbytes,) if op == OPS[0] else (case.nbytes, *case.shape)
        return self._handle.decision.route(op, case.mode, case.device_type, case.dtype).backend_for(*sizes)

    def variants(self, case: BenchCase) -> tuple[str, ...]:
        if not self.supports(case) or self.composes(case):
            return ()
        return self._handle.variants(_hook(case), case.nbytes, case.shape[0] if case.fused else 0).get(self.name, ())

    def use_variants(self, choices: Sequence[VariantChoice]) -> None:
        self._handle.use_variants({self.name: choices})

    def capture(self) -> AbstractContextManager[None]:
        return comm.capture()

    def needs_spacer(self, case: BenchCase) -> bool:
        return self.name == _NCCL and nccl_needs_spacer(case)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        if weight is None:
            return (self._handle.all_reduce(state[0], state[0] if in_place else None),)
        tensor, residual = state
        return self._handle.all_reduce_add_rms_norm(
            tensor, residual, weight, residual_out=residual if in_place else None
        )

    def call_quant(
        self, state: State, weight: torch.Tensor, quant: str, scale: torch.Tensor | None, *, in_place: bool
    ) -> State:
        tensor, residual = state
        values, scales, summed, _ = self._handle.all_reduce_add_rms_norm_quant(
            tensor, residual, weight, quant=quant, scale=scale, residual_out=residual if in_place else None
        )
        return values, scales, summed

    def call_separately(
        self, state: State, weight: torch.Tensor, quant: str, scale: torch.Tensor | None, *, in_place: bool = False
    ) -> State:
        return _quantized(self.call(state, weight, in_place=in_place), quant, scale)

    def note_failure(self, job: Job) -> None:
        self._has_stopped = any(job.all_gather(self._handle.failure is not None))

    def failure_reason(self) -> str:
        failed = (c for c in self._handle.decision.candidates if c.name == self.name and c.verdict == "failed")
        return next((c.reason if c.rank is None else f"rank {c.rank}: {c.reason}" for c in failed), "")

    def close(self) -> None:
        comm.close(self._group)


class _Separate(Contender):
    """A backend's fused call and core's quantisation, beside the backend's one kernel for both."""

    kind = "backend"

    def __init__(self, whole: _BackendContender) -> None:
        super().__init__(f"{whole.name}+quantize")
        self._whole = whole

    def supports(self, case: BenchCase) -> bool:
        return case.quant is not None and self._whole.supports(case) and not self._whole.composes(case)

    def composes(self, case: BenchCase) -> bool:
        return self.supports(case)

    def capture(self) -> AbstractContextManager[None]:
        return self._whole.capture()

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        return self._whole.call(state, weight, in_place=in_place)

    def call_quant(
        self, state: State, weight: torch.Tensor, quant: str, scale: torch.Tensor | None, *, in_place: bool
    ) -> State:
        return self._whole.call_separately(state, weight, quant, scale, in_place=in_place)

    def note_failure(self, job: Job) -> None:
        self._whole.note_failure(job)

    def failure_reason(self) -> str:
        return self._whole.failure_reason()


class _Terminal(Contender):
    """torch.distributed; for the fused operation, core's composition of its sum and a norm."""

    kind = "terminal"

    def __init__(self, job: Job) -> None:
        super().__init__(TERMINAL)
        self._group = job.world

    def supports(self, case: BenchCase) -> bool:  # noqa: ARG002 - it supports every case
        return True

    def composes(self, case: BenchCase) -> bool:
        return case.fused

    def needs_spacer(self, case: BenchCase) -> bool:
        # Out of place, the copy runs between NCCL's kernels.
        return case.place == "in" and nccl_needs_spacer(case)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        if weight is None:
            return (fallback.torch_distributed(self._group, state[0], state[0] if in_place else None),)
        tensor, residual = state
        total = fallback.torch_distributed(self._group, tensor, None)
        # On GPUs the output overwrites the sum, as in a handle.
        out = total if total.is_cuda else None
        return fallback.add_rms_norm(total, residual, weight, 1e-6, 0.0, out, residual if in_place else None)

    def call_quant(
        self, state: State, weight: torch.Tensor, quant: str, scale: torch.Tensor | None, *, in_place: bool
    ) -> State:
        return _quantized(self.call(state, weight, in_place=in_place), quant, scale)


def _hook(case: BenchCase) -> str:
    """Return core's name of the case's operation."""
    return case.op.partition(":")[0]


def _quantized(normed_and_summed: State, quant: str, scale: torch.Tensor | None) -> State:
    """Quantise a norm as core does where no backend has a kernel for the whole call."""
    normed, summed = normed_and_summed
    if scale is None:
        groups = 1 if quant == "fp8_per_token" else normed.shape[1] // GROUP_SIZE
        scale = torch.empty((len(normed), groups), dtype=torch.float32, device=normed.device)
    return (*fallback.quantize(normed, quant, scale), summed)


def nccl_needs_spacer(case: BenchCase) -> bool:
    """Return whether a chain of NCCL's kernels alone needs spacers.

    In a graph, NCCL's kernel takes three times as long directly behind itself as behind any other kernel, even one on a
    single element: 20 us against 7 for 1 KiB, 29 to 36 against 15 for 1 MiB (two H200, torch 2.11, NCCL 2.28.9). In a
    model another kernel always lies in between.
    """
    return case.mode == "graph" and not case.fused


def terminal(job: Job) -> Contender:
    """Return the terminal fallback, to which every contender is compared."""
    return _Terminal(job)


def backends(decision: comm.Decision, only: Sequence[str], *, quantized: bool) -> Iterator[Contender | tuple[str, str]]:
    """Yield a contender for each installed backend that this group can use, (name, reason) for the others. Collective.

    Args:
        decision: the world group's decision.
        only: names of the backends to measure; empty for all.
        quantized: whether each backend's fused call followed by core's quantisation is a contender, too.
    """
    for candidate in decision.candidates:
        if candidate.name == TERMINAL or (only and candidate.name not in only):
            continue
        if candidate.verdict not in {"serves", "standby"}:
            yield candidate.name, candidate.reason
            continue
        # A group has only one handle, so each backend gets a group of its own.
        group = dist.new_group()
        try:
            handle = comm.get_backend(group, backends=(candidate.name,), wire="")
        except comm.BackendUnavailableError as error:
            yield candidate.name, str(error)
            continue
        whole = _BackendContender(candidate.name, handle, group)
        yield whole
        if quantized:
            yield _Separate(whole)
