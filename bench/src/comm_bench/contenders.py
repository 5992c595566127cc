"""Who is measured: this group's backends, plain torch.distributed, and the limits and peers of other modules."""

from __future__ import annotations

import abc
import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core import fallback
from comm_core.command import describe
from comm_core.types import TERMINAL

from comm_bench.cases import BenchCase
from comm_bench.watch import Watch

__all__ = ["Absent", "Contender", "Job", "Recorder", "State", "backends", "behind_itself", "terminal"]

# Of tensors in memory that several share, in bytes: as torch's allocator has it.
_ALIGNMENT = 512
# The backend that launches NCCL's kernels and no other.
_NCCL = "nccl"
#: What a call hands on to the next: the tensor, and for the fused operation the residual.
State = tuple[torch.Tensor, ...]


class Absent(Exception):  # noqa: N818 - it isn't an error, but the reason why a row is missing
    """A contender that can't take part on this rank, and why."""


class Job:
    """The ranks that measure together.

    Attributes:
        rank: of this process.
        world_size: ranks.
        device: where the tensors live.
        world: the group that has all of them.
        watch: ends this process if a step doesn't.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        if dist.group.WORLD is None:
            raise RuntimeError("torch.distributed isn't initialised")
        self.world = dist.group.WORLD
        self.watch = Watch()
        # For what the ranks tell each other, beside the groups that are measured.
        self._group = dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Collective."""
        # Not by torch's `all_gather_object`: that takes numpy, which torch doesn't bring along.
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        counts = self._gathered(torch.tensor([mine.numel()]))
        longest = int(max(counts))
        texts = self._gathered(torch.nn.functional.pad(mine, (0, longest - mine.numel())))
        pairs = zip(texts, counts, strict=True)
        return [pickle.loads(bytes(text[:count].tolist())) for text, count in pairs]  # noqa: S301 - this job's own ranks

    def _gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(everyone, tensor, group=self._group)
        return everyone

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Let go of what it holds."""
        self.watch.close()

    def together(self, step: Callable[[], Any]) -> Any:
        """Run a step on every rank; where one fails, all of them raise `Absent` with that rank's reason. Collective."""
        result, reason = None, ""
        try:
            result = step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Absent as absent:
            reason = str(absent)
        except Exception as error:  # noqa: BLE001 - a contender's border: it is somebody else's code, and becomes a row less
            reason = describe(error)
        for rank, said in enumerate(self.gather(reason)):
            if said:
                raise Absent(f"rank {rank}: {said}")
        return result


class Recorder:
    """Records calls in CUDA graphs, and keeps these."""

    def __init__(self) -> None:
        # Peers may have opened, by IPC, whatever a recorded call has seen, and libraries let go of it at times of their
        # own: so graphs and their memory live as long as this does.
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """A graph of what `body` does; its replay. Earlier graphs must not be replayed any more. Collective."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # "thread_local": other threads of the process may use CUDA meanwhile.
        with self.capture(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        self._graphs.append(graph)
        # Of tensors that `body` holds the graph has no more than their addresses.
        return functools.partial(_replay, graph, body)

    def capture(self) -> AbstractContextManager[None]:
        """What the calls need around a graph's capture. Collective."""
        return contextlib.nullcontext()

    def forget(self) -> None:
        """Let go of what is kept. Local, once all ranks are done with it."""
        self._graphs.clear()
        self._pool = None


def _replay(graph: torch.cuda.CUDAGraph, body: Callable[[], None]) -> None:  # noqa: ARG001 - kept as long as this is called
    graph.replay()


class Contender(Recorder, abc.ABC):
    """Something that all-reduces, or a limit on that; a row of each table whose case it takes.

    Attributes:
        name: of the row.
        kind: "backend", "terminal", "peer" or "limit".
        unit: how many of what is measured one call does.
    """

    kind = "peer"
    unit = 1

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._inputs: list[torch.Tensor] = []  # kept like the graphs that read them

    @abc.abstractmethod
    def takes(self, case: BenchCase) -> bool:
        """Whether it serves such calls. Local, the same on every rank."""

    @abc.abstractmethod
    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        """One call, with an epsilon of 1e-6; what the next one gets.

        Args:
            state: the tensor to be reduced, for the fused operation then the residual.
            weight: `[hidden_size]` for the fused operation, else None.
            in_place: whether the output goes to the input's memory, of the fused operation the residual's.
        """

    def inputs(self, case: BenchCase) -> State:
        """Memory for what the first call reads; the residual second. Local, once a case; what it held before goes."""
        return self.parts(case, 1 + case.fused)

    def parts(self, case: BenchCase, count: int) -> State:
        """So many tensors of the case's shape and dtype, side by side. Local; what they held before goes."""
        room = -(-case.nbytes // _ALIGNMENT) * _ALIGNMENT
        held = self._inputs[-1].nbytes if self._inputs else 0
        if held < count * room:
            # Twice what there was, at least: all of them are kept, and a sweep may go on by small steps.
            nbytes = max(count * room, 2 * held)
            self._inputs.append(torch.empty(nbytes, dtype=torch.uint8, device=case.device_type))
        parts = (self._inputs[-1][number * room :][: case.nbytes] for number in range(count))
        return tuple(part.view(getattr(torch, case.dtype)).view(case.shape) for part in parts)

    def spaced(self, case: BenchCase) -> bool:  # noqa: ARG002 - most never are
        """Whether a chain of its calls needs a kernel of somebody else's between them, whose time is subtracted."""
        return False

    def lost(self) -> str:
        """Why it can't be measured any more, "" where it can. Local, the same on every rank."""
        return ""

    def forget(self) -> None:
        """As a recorder does, and of the inputs."""
        super().forget()
        self._inputs.clear()

    def close(self) -> None:
        """Give back what it holds, after `forget`. Collective."""


class _Named(Contender):
    """A backend of comm-core, as users call it: through a group's handle that has to use this one."""

    kind = "backend"

    def __init__(self, name: str, handle: comm.Backend, group: dist.ProcessGroup) -> None:
        super().__init__(name)
        self._handle = handle
        self._group = group

    def takes(self, case: BenchCase) -> bool:
        decision = self._handle.decision
        sizes = (case.nbytes, *case.shape) if case.fused else (case.nbytes,)
        owner = decision.route(case.op, case.mode, case.device_type, case.dtype).backend_for(*sizes)
        if case.fused and owner == TERMINAL:
            # Core composes it of the plain sum and a norm.
            owner = decision.route("all_reduce", case.mode, case.device_type, case.dtype).backend_for(case.nbytes)
        return owner == self.name

    def capture(self) -> AbstractContextManager[None]:
        return comm.capture()

    def spaced(self, case: BenchCase) -> bool:
        return self.name == _NCCL and behind_itself(case)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        if weight is None:
            return (self._handle.all_reduce(state[0], state[0] if in_place else None),)
        tensor, residual = state
        return self._handle.all_reduce_add_rms_norm(
            tensor, residual, weight, residual_out=residual if in_place else None
        )

    def lost(self) -> str:
        failed = (c for c in self._handle.decision.candidates if c.name == self.name and c.verdict == "failed")
        return next((c.reason if c.rank is None else f"rank {c.rank}: {c.reason}" for c in failed), "")

    def close(self) -> None:
        comm.close(self._group)


class _Terminal(Contender):
    """torch.distributed itself, and for the fused operation core's composition on top of it."""

    kind = "terminal"

    def __init__(self, job: Job) -> None:
        super().__init__(TERMINAL)
        self._group = job.world

    def takes(self, case: BenchCase) -> bool:  # noqa: ARG002 - it takes every one
        return True

    def spaced(self, case: BenchCase) -> bool:
        # Out of place the copy is between its kernels.
        return case.place == "in" and behind_itself(case)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        if weight is None:
            return (fallback.torch_distributed(self._group, state[0], state[0] if in_place else None),)
        tensor, residual = state
        total = fallback.torch_distributed(self._group, tensor, None)
        # Written over the sum on GPUs, as a handle does it.
        out = total if total.is_cuda else None
        return fallback.add_rms_norm(total, residual, weight, 1e-6, 0.0, out, residual if in_place else None)


def behind_itself(case: BenchCase) -> bool:
    """Whether NCCL's kernels, with nothing else in a chain, need something between them.

    Right behind itself NCCL's kernel takes three times as long in a graph as behind any other kernel, if only of one
    element: 20 us against 7 for 1 KiB, 29 to 36 against 15 for 1 MiB (two H200, torch 2.11, NCCL 2.28.9). A model
    always has one there.
    """
    return case.mode == "graph" and not case.fused


def terminal(job: Job) -> Contender:
    """The reference: what every route ends in."""
    return _Terminal(job)


def backends(decision: comm.Decision, only: Sequence[str]) -> Iterator[Contender | tuple[str, str]]:
    """A contender for each installed backend that this group can use; (name, reason) for the others. Collective.

    Args:
        decision: the world group's.
        only: names; empty for all.
    """
    for candidate in decision.candidates:
        if candidate.name == TERMINAL or (only and candidate.name not in only):
            continue
        if candidate.verdict not in {"serves", "standby"}:
            yield candidate.name, candidate.reason
            continue
        # A handle of its own, in a group of its own: one group has one handle.
        group = dist.new_group()
        try:
            handle = comm.get_backend(group, backends=(candidate.name,))
        except comm.BackendUnavailableError as error:
            yield candidate.name, str(error)
            continue
        yield _Named(candidate.name, handle, group)
