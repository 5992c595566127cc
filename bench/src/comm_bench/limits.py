"""What no all-reduce can beat on this machine, measured beside it: launches, a message's way, bandwidths.

Over W ranks an all-reduce has to move 2(W-1)/W of its bytes out of every rank, and as much in (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009); at W 2 that is the message itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from comm_core import kernels

from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent, Contender, Job, State
from comm_bench.results import HOP, LAUNCH
from comm_bench.symmetric import Symmetric, allocate

__all__ = ["limits"]

# Ways to and fro that are timed together.
_ROUNDS = 100

_library = kernels.Library("comm_bench")


class _Limit(Contender):
    """A limit that is one call of a function."""

    kind = "limit"

    def __init__(self, name: str, job: Job, function: Callable[[torch.Tensor], object], unit: int = 1) -> None:
        super().__init__(name)
        self._device = job.device
        self._function = function
        self.unit = unit

    def takes(self, case: BenchCase) -> bool:
        return case.device_type == self._device.type

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:  # noqa: ARG002 - it has no place
        self._function(state[0])
        return state


class _Launch(_Limit):
    """A kernel that does nothing, and as many new outputs as the operation has; the binding allocates the first."""

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        for tensor in state[1:]:
            torch.empty_like(tensor)
        return super().call(state, weight, in_place=in_place)


def limits(job: Job, capacity: int) -> list[tuple[str, Callable[[], Contender]]]:
    """Names, and what makes each limit on every rank together or raises `Absent`.

    Args:
        job: the ranks.
        capacity: bytes of the largest message.
    """
    if job.device.type != "cuda":
        return [("limit:copy", lambda: _local_copy(job, capacity))]
    shared: dict[str, Any] = {}

    def module() -> Any:
        missing = _library.missing()
        if missing is not None:
            raise Absent(missing)
        return _library.load()

    def symmetric() -> Symmetric:
        if "symmetric" not in shared:
            shared["symmetric"] = allocate(job, _share(job, capacity) * (job.world_size - 1) + 256)
        found: Symmetric = shared["symmetric"]
        return found

    return [
        (LAUNCH, lambda: _Launch(LAUNCH, job, module().launch)),
        (HOP, lambda: _hop(job, module(), symmetric())),
        ("limit:push", lambda: _transfer("push", job, module(), symmetric(), capacity)),
        ("limit:pull", lambda: _transfer("pull", job, module(), symmetric(), capacity)),
        ("limit:copy", lambda: _copy_engine(job, symmetric(), capacity)),
    ]


def _share(job: Job, nbytes: int) -> int:
    """Bytes that a rank sends to each other one in an all-reduce of `nbytes`, whole vectors."""
    return -(-2 * nbytes // job.world_size // 16) * 16


def _hop(job: Job, module: Any, symmetric: Symmetric) -> Contender:
    """A store by one rank until a poll by another sees it; between the first two ranks."""
    sent = torch.zeros(1, dtype=torch.int32, device=job.device)
    # Behind what the transfers use.
    offset = symmetric.own.nbytes - 256
    if job.rank > 1:
        return _Limit(HOP, job, lambda _: None, 2 * _ROUNDS)
    mine, theirs = (symmetric.addresses[rank] + offset for rank in (job.rank, 1 - job.rank))
    first = job.rank == 0
    return _Limit(HOP, job, lambda _: module.hop(sent, mine, theirs, first, _ROUNDS), 2 * _ROUNDS)


def _transfer(kind: str, job: Job, module: Any, symmetric: Symmetric, capacity: int) -> Contender:
    """The bytes that an all-reduce must move, to or from every peer at once by kernels of this rank."""
    local = torch.zeros(_share(job, capacity), dtype=torch.uint8, device=job.device)
    room = _share(job, capacity)
    peers = [(job.rank + step) % job.world_size for step in range(1, job.world_size)]

    def move(tensor: torch.Tensor) -> None:
        share = _share(job, tensor.nbytes)
        for peer in peers:
            # A place of this rank's own in each peer's buffer.
            remote = symmetric.addresses[peer] + room * ((job.rank - peer) % job.world_size - 1)
            to, source = (remote, local.data_ptr()) if kind == "push" else (local.data_ptr(), remote)
            module.transfer(local, to, source, share)

    return _Limit(f"limit:{kind}", job, move)


def _copy_engine(job: Job, symmetric: Symmetric, capacity: int) -> Contender:
    """The same bytes by copies to the first peers' memory, which the device's copy engines do."""
    local = torch.zeros(_share(job, capacity), dtype=torch.uint8, device=job.device)
    peers = [(job.rank + step) % job.world_size for step in range(1, job.world_size)]

    @functools.cache
    def parts(nbytes: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        share = _share(job, nbytes)
        return tuple((symmetric.of(peer, share), local[:share]) for peer in peers)

    def move(tensor: torch.Tensor) -> None:
        for remote, mine in parts(tensor.nbytes):
            remote.copy_(mine)

    return _Limit("limit:copy", job, move)


def _local_copy(job: Job, capacity: int) -> Contender:
    """The bytes that an all-reduce must take in, copied within this process; memory is shared, and so is its speed."""
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
