"""The machine's limits, measured beside the contenders: launch, hop between two ranks, and bandwidths.

Over W ranks an all-reduce must move 2(W-1)/W of the message out of every rank, and as much in (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009); for W = 2 that is the whole message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from comm_core import Topology, eligibility, kernels, memory

from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent, Contender, Job, State
from comm_bench.results import HOP, LAUNCH
from comm_bench.shared import share_buffer

__all__ = ["limits"]

# Round trips timed together.
_ROUNDS = 100
# The part of the buffer that hops use, behind the transfers' part.
_HOP_NBYTES = 256

_library = kernels.Library("comm_bench")


class _Limit(Contender):
    """A limit measured by calling a function, maybe on a shared buffer."""

    kind = "limit"

    def __init__(
        self,
        name: str,
        job: Job,
        function: Callable[[torch.Tensor], object],
        unit: int = 1,
        buffer: memory.SharedBuffer | None = None,
    ) -> None:
        super().__init__(name)
        self._device = job.device
        self._function = function
        self._buffer = buffer
        self.unit = unit

    def supports(self, case: BenchCase) -> bool:
        return case.device_type == self._device.type

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - the same in and out of place
        self._function(state[0])
        return state

    def close(self) -> None:
        # All limits have one buffer and are closed together, so the first one closes it for all.
        if self._buffer is not None:
            self._buffer.close()


class _Launch(_Limit):
    """An empty kernel, and an allocation for each output of the operation; the binding allocates the first."""

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        for tensor in state[1:]:
            torch.empty_like(tensor)
        return super().call(state, weight, in_place=in_place)


def limits(job: Job, capacity: int, topology: Topology) -> list[tuple[str, Callable[[], Contender]]]:
    """Return the limits' names, each with a collective factory that makes the limit or raises `Absent`.

    Args:
        job: the ranks.
        capacity: the largest message, in bytes.
        topology: the ranks' topology.
    """
    if job.device.type != "cuda":
        return [("limit:copy", lambda: _local_copy(job, capacity))]
    shared: dict[str, memory.SharedBuffer] = {}

    def module() -> Any:
        missing = _library.missing()
        if missing is not None:
            raise Absent(missing)
        return _library.load()

    def buffer() -> memory.SharedBuffer:
        if "buffer" not in shared:
            nbytes = _share(job, capacity) * (job.world_size - 1) + _HOP_NBYTES
            shared["buffer"] = share_buffer(job, nbytes, fabric=bool(eligibility.unshared_memory(topology)))
        return shared["buffer"]

    return [
        (LAUNCH, lambda: _Launch(LAUNCH, job, module().launch)),
        # First the buffer, which all ranks make together, then the module, which one rank alone may lack.
        (HOP, lambda: _hop(job, buffer(), module())),
        ("limit:push", lambda: _transfer("push", job, buffer(), module(), capacity)),
        ("limit:pull", lambda: _transfer("pull", job, buffer(), module(), capacity)),
        ("limit:copy", lambda: _copy_engine(job, buffer(), capacity)),
    ]


def _share(job: Job, nbytes: int) -> int:
    """Return the bytes that a rank sends to each other rank in an all-reduce of `nbytes`, in whole vectors."""
    return -(-2 * nbytes // job.world_size // 16) * 16


def _hop(job: Job, buffer: memory.SharedBuffer, module: Any) -> Contender:
    """Make the limit "hop": the time from a store on one of the first two ranks until a poll on the other sees it."""
    sent = torch.zeros(1, dtype=torch.int32, device=job.device)
    offset = buffer.nbytes - _HOP_NBYTES
    if job.rank > 1:
        return _Limit(HOP, job, lambda _: None, 2 * _ROUNDS, buffer)
    mine, theirs = (buffer.addresses[rank] + offset for rank in (job.rank, 1 - job.rank))
    first = job.rank == 0
    return _Limit(HOP, job, lambda _: module.hop(sent, mine, theirs, first, _ROUNDS), 2 * _ROUNDS, buffer)


def _transfer(kind: str, job: Job, buffer: memory.SharedBuffer, module: Any, capacity: int) -> Contender:
    """Make a limit that moves an all-reduce's least bytes to or from every peer, with this rank's kernels."""
    local = torch.zeros(_share(job, capacity), dtype=torch.uint8, device=job.device)
    room = _share(job, capacity)
    peers = [(job.rank + step) % job.world_size for step in range(1, job.world_size)]

    def move(tensor: torch.Tensor) -> None:
        share = _share(job, tensor.nbytes)
        for peer in peers:
            # Each rank uses a part of its own in each peer's buffer.
            remote = buffer.addresses[peer] + room * ((job.rank - peer) % job.world_size - 1)
            to, source = (remote, local.data_ptr()) if kind == "push" else (local.data_ptr(), remote)
            module.transfer(local, to, source, share)

    return _Limit(f"limit:{kind}", job, move, buffer=buffer)


def _copy_engine(job: Job, buffer: memory.SharedBuffer, capacity: int) -> Contender:
    """Make a limit that moves an all-reduce's least bytes to every peer, with the device's copy engines."""
    from cuda.bindings import driver

    local = torch.zeros(_share(job, capacity), dtype=torch.uint8, device=job.device)
    peers = [(job.rank + step) % job.world_size for step in range(1, job.world_size)]

    def move(tensor: torch.Tensor) -> None:
        share = _share(job, tensor.nbytes)
        stream = torch.cuda.current_stream(job.device).cuda_stream
        for peer in peers:
            (status,) = driver.cuMemcpyDtoDAsync(buffer.addresses[peer], local.data_ptr(), share, stream)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"cuMemcpyDtoDAsync: {status.name}")

    return _Limit("limit:copy", job, move, buffer=buffer)


def _local_copy(job: Job, capacity: int) -> Contender:
    """Make a limit that copies an all-reduce's least bytes in this process; all ranks share the memory's bandwidth."""
    source = torch.zeros(_share(job, capacity) * (job.world_size - 1), dtype=torch.uint8)
    target = torch.zeros_like(source)

    @functools.cache
    def parts(nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        moved = _share(job, nbytes) * (job.world_size - 1)
        return target[:moved], source[:moved]

    def move(tensor: torch.Tensor) -> None:
        to, origin = parts(tensor.nbytes)
        to.copy_(origin)

    return _Limit("limit:copy", job, move)
