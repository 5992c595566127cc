"""The base classes of the measured contenders, and the ranks that measure them."""

from __future__ import annotations

import abc
import contextlib
import functools
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from comm_core.command import describe

from comm_bench.cases import BenchCase
from comm_bench.watch import Watchdog

if TYPE_CHECKING:
    from comm_core.tuning import VariantChoice

__all__ = ["Absent", "Contender", "Job", "Recorder", "State"]

# Bytes to which tensors in one allocation are aligned, as by torch's allocator.
_ALIGNMENT = 512
#: A call's inputs, and its outputs as the next call's inputs: the tensor, and for the fused operation the residual.
State = tuple[torch.Tensor, ...]


class Absent(Exception):  # noqa: N818 - not an error, but the reason that a row is missing
    """The reason that a contender can't be measured."""


class Job:
    """The ranks that measure together.

    Attributes:
        rank: this process's rank.
        world_size: the number of ranks.
        device: the tensors' device.
        world: the process group of all ranks.
        watchdog: ends this process if a step takes too long.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        if dist.group.WORLD is None:
            raise RuntimeError("torch.distributed isn't initialised")
        self.world = dist.group.WORLD
        self.watchdog = Watchdog()
        # The ranks exchange their results in this group, apart from the measured groups.
        self._group = dist.new_group(backend="gloo")

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. Collective."""
        # torch's `all_gather_object` needs numpy, which torch doesn't install.
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        counts = self._all_gather_tensor(torch.tensor([mine.numel()]))
        longest = int(max(counts))
        texts = self._all_gather_tensor(torch.nn.functional.pad(mine, (0, longest - mine.numel())))
        pairs = zip(texts, counts, strict=True)
        return [pickle.loads(bytes(text[:count].tolist())) for text, count in pairs]  # noqa: S301 - this job's own ranks

    def _all_gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(everyone, tensor, group=self._group)
        return everyone

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Stop the watchdog."""
        self.watchdog.close()

    def run_collectively(self, step: Callable[[], Any]) -> Any:
        """Run a step on every rank; if one rank fails, all raise `Absent` with that rank's reason. Collective."""
        result, reason = None, ""
        try:
            result = step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Absent as absent:
            reason = str(absent)
        except Exception as error:  # noqa: BLE001 - other libraries' code may raise anything; its row is left out
            reason = describe(error)
        for rank, failure in enumerate(self.all_gather(reason)):
            if failure:
                raise Absent(f"rank {rank}: {failure}")
        return result


class Recorder:
    """Records calls in CUDA graphs and keeps the graphs."""

    def __init__(self) -> None:
        # Other ranks may have opened a recorded call's memory by IPC, and libraries close it at times of their own. So
        # graphs and their memory stay until `release`.
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Record `body` in a graph and return its replay. Earlier graphs may not be replayed again. Collective."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # "thread_local": other threads of the process may call CUDA during the capture.
        with self.capture(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        self._graphs.append(graph)
        # The replay keeps `body`, because the graph has only the addresses of its tensors.
        return functools.partial(_replay, graph, body)

    def capture(self) -> AbstractContextManager[None]:
        """Return the context manager that the calls need around a graph's capture. Collective."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Release the graphs. Local; call it when no rank needs them any more."""
        self._graphs.clear()
        self._pool = None


def _replay(graph: torch.cuda.CUDAGraph, body: Callable[[], None]) -> None:  # noqa: ARG001 - keeps its tensors
    graph.replay()


class Contender(Recorder, abc.ABC):
    """An implementation of all-reduce, or a limit: it has a row for each case that it supports.

    Attributes:
        name: the row's name.
        kind: "backend", "terminal", "peer" or "limit".
        unit: the number of measured operations in one call.
    """

    kind = "peer"
    unit = 1

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._inputs: list[torch.Tensor] = []  # kept as long as the graphs that read them

    @abc.abstractmethod
    def supports(self, case: BenchCase) -> bool:
        """Return whether the contender serves such calls. Local, the same on every rank."""

    @abc.abstractmethod
    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        """Make one call, with an epsilon of 1e-6, and return the next call's inputs.

        Args:
            state: the tensor to reduce; for the fused operation also the residual.
            weight: `[hidden_size]` for the fused operation, else None.
            in_place: whether the output overwrites the input; for the fused operation, the residual.
        """

    def call_quant(
        self, state: State, weight: torch.Tensor, quant: str, scale: torch.Tensor | None, *, in_place: bool
    ) -> State:
        """Make one call that also quantises the norm, and return the values, their scales and the sum.

        Args:
            state: the tensor to reduce and the residual.
            weight: `[hidden_size]`.
            quant: one of `comm_core.types.QUANTS`.
            scale: for "fp8_static", the scale; else None.
            in_place: whether the sum overwrites the residual.
        """
        raise NotImplementedError

    def call_separately(
        self,
        state: State,  # noqa: ARG002 - most contenders have no such promise
        weight: torch.Tensor,  # noqa: ARG002
        quant: str,  # noqa: ARG002
        scale: torch.Tensor | None,  # noqa: ARG002
    ) -> State | None:
        """Quantise the norm of a fused call by core; return the results if `call_quant` has to give the same bits."""
        return None

    def inputs(self, case: BenchCase) -> State:
        """Return uninitialised tensors for the first call's inputs, the residual second. Local, once per case."""
        return self.allocate(case, 1 + case.fused)

    def allocate(self, case: BenchCase, count: int) -> State:
        """Return this many uninitialised tensors of the case's shape and dtype, side by side in memory. Local."""
        room = -(-case.nbytes // _ALIGNMENT) * _ALIGNMENT
        held = self._inputs[-1].nbytes if self._inputs else 0
        if held < count * room:
            # At least double: all allocations are kept, and a sweep's sizes may grow by small steps.
            nbytes = max(count * room, 2 * held)
            self._inputs.append(torch.empty(nbytes, dtype=torch.uint8, device=case.device_type))
        parts = (self._inputs[-1][number * room :][: case.nbytes] for number in range(count))
        return tuple(part.view(getattr(torch, case.dtype)).view(case.shape) for part in parts)

    def select(self) -> None:
        """Get ready for calls, after those of another contender. Local, the same on every rank."""

    def variants(self, case: BenchCase) -> tuple[str, ...]:  # noqa: ARG002 - most contenders have none
        """Return the contender's variants for such calls, the one in use first. Local, the same on every rank."""
        return ()

    def use_variants(self, choices: Sequence[VariantChoice]) -> None:
        """Make calls by these variants from now on; () stands for the contender's own choice. Local."""

    def note_failure(self, job: Job) -> None:
        """Note that a case failed; a contender that can't go on supports no later case. Collective."""

    def needs_spacer(self, case: BenchCase) -> bool:  # noqa: ARG002 - most contenders need none
        """Return whether a chain needs a spacer after each call. The spacer's time is subtracted."""
        return False

    def composes(self, case: BenchCase) -> bool:  # noqa: ARG002 - most contenders have a kernel of their own
        """Return whether such a call is composed by core, not by a kernel for the operation."""
        return False

    def failure_reason(self) -> str:
        """Return the reason that the contender can't be measured any more, or "". Local, the same on every rank."""
        return ""

    def release(self) -> None:
        """Release the graphs and the inputs."""
        super().release()
        self._inputs.clear()

    def close(self) -> None:
        """Free the contender's resources; `release` comes first. Collective."""
