"""All-reduce over shared memory, for CPU tensors of ranks on one host.

The protocol, and why it needs no barrier, is told in `csrc/protocol.h`. Sums are in rank order, bfloat16 and float16 in
float32 and rounded once: every rank holds the same bits, and a rerun gives them again.
"""

from __future__ import annotations

import fcntl
import functools
import os
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import comm_core as comm
import torch
from comm_core import kernels
from comm_core.types import rank_label

__all__ = ["COMM_HOOK_API", "Session", "all_reduce", "close", "connect", "is_available", "probe"]

COMM_HOOK_API = (1, 0)

#: Ranks that the segment has room for; `kMaxRanks` in protocol.h.
MAX_RANKS = 64
#: Of one slot, in bytes: two slots lie in the second-level cache of a server's core. Of 128 KiB to 4 MiB it was the
#: fastest for 64 KiB and more with two processes, on two cores of an AMD EPYC (Zen 4) with 1 MiB of that cache each.
CHUNK_NBYTES = 512 << 10
#: Messages of more than two ranks go two-shot from this size on, in bytes: with four processes on the same two cores
#: both ways took equally long at 8 KiB, and two-shot half as long from 64 KiB on.
TWO_SHOT_NBYTES = 16 << 10
# Looks at a peer's step before the processor is given away: about 30 µs, more than any call takes but the largest,
# and much less than being scheduled anew costs. Where ranks share processors, the peer may wait for this very one.
_SPINS = 2000
_SPINS_CROWDED = 20

# `DType` in reduce.h. Bytes are summed alike with and without a sign.
_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 7,
}

_library = kernels.Library("comm_plugin_shm")


class Session:
    """A group's segment, as this rank has it mapped.

    Attributes:
        run: (input address, output address, elements, dtype's code) -> 0, or 1 + the group rank that didn't come.
        memory_nbytes: of the segment, which the ranks share.
    """

    def __init__(
        self, run: Any, round_trip: Any, memory_nbytes: int, pids: tuple[int, ...], context: comm.GroupContext
    ) -> None:
        self.run = run
        self._round_trip = round_trip
        self.memory_nbytes = memory_nbytes
        self._pids = pids
        self._context = context

    def limits(self) -> dict[str, float]:
        """What bounds this backend here, in microseconds by what it is. Collective, takes a tenth of a second."""
        large = 16 << 20
        # One-shot, a call reads the input twice and the other slots once, and writes its slot and the output; two-shot
        # less. A copy reads and writes.
        moved = (self._context.world_size + 3) * large // 2
        source, target = torch.ones(moved, dtype=torch.uint8), torch.ones(moved, dtype=torch.uint8)
        copied = [_timed(lambda: target.copy_(source), 1) for _ in range(9)]
        kernel = functools.partial(self.run, source.data_ptr(), target.data_ptr(), 1 << 10, _CODES[torch.uint8])
        called = [_timed(kernel, 1000) for _ in range(9)]
        return {
            "a flag's round trip between two ranks": self._round_trip(10_000) * 1e6,
            "its kernel alone, on 1 KiB": statistics.median(called) * 1e6,
            "a copy of the bytes that 16 MiB move": statistics.median(copied) * 1e6,
        }

    def release(self) -> None:
        """Let go of the mapping, which the two functions hold."""
        self.run = self._round_trip = None

    def fail(self, culprit: int) -> NoReturn:
        """Raise that the group rank `culprit` didn't come."""
        rank = f"rank {rank_label(culprit, self._context.global_ranks[culprit])}"
        pid = self._pids[culprit]
        why = "has ended" if _ended(pid) else f"didn't come within {self._context.wait_timeout_s:g} s"
        raise comm.CommTimeoutError(f"{rank}, process {pid}, {why}", (culprit,))


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Whether the native code can be had here, and which processes this one can see."""
    return {"missing": _library.missing(), "pid_namespace": str(Path("/proc/self/ns/pid").readlink())}


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """One host, a process namespace in common, and two to 64 ranks."""
    if "cpu" not in topology.device_types:
        return comm.Unavailable("it sums CPU tensors, and this group has none")
    if not topology.one_host:
        hosts = len({info.host.id for info in topology.ranks})
        return comm.Unavailable(f"its ranks are on {hosts} hosts, or in containers that share no memory")
    if topology.world_size > MAX_RANKS:
        return comm.Unavailable(f"it takes {MAX_RANKS} ranks at most, and the group has {topology.world_size}")
    missing = _missing(topology)
    if missing:
        return comm.Unavailable(missing)
    return comm.Available(300, (comm.Range("all_reduce", modes=("eager",), device_types=("cpu",)),))


def _missing(topology: comm.Topology) -> str:
    """What the ranks' own facts say against this backend; "" for nothing."""
    namespaces = set()
    for rank, info in enumerate(topology.ranks):
        facts = info.facts.get("shm")
        if facts is None:
            return f"rank {rank} didn't report whether it has the native code"
        if facts["missing"]:
            return f"on rank {rank} {facts['missing']}"
        namespaces.add(facts["pid_namespace"])
    return "" if len(namespaces) == 1 else "its ranks can't see each other's processes: their PID namespaces differ"


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Make a segment without a name, hand it to the others, and map it.

    It is a memfd of the first rank's, which the others open through /proc. It never has a name in /dev/shm, so there is
    nothing to be left behind, whoever dies when; and its size isn't limited by what a container gives to /dev/shm.
    """
    module = _library.load()
    crowded = context.world_size > len(os.sched_getaffinity(0))
    nbytes = int(module.needed_nbytes(context.world_size, CHUNK_NBYTES))
    # Random, so that a process of another machine's clone can't be taken for the first rank's.
    name = f"comm-plugin-shm-{secrets.token_hex(8)}"
    mine = _create(name, nbytes) if context.rank == 0 else -1
    theirs = -1
    run = round_trip = None
    try:
        peers = context.control.all_gather({"pid": os.getpid(), "name": name, "descriptor": mine})
        theirs = _open(peers[0]["pid"], peers[0]["descriptor"], peers[0]["name"])
        pids = tuple(peer["pid"] for peer in peers)
        run, round_trip = module.connect(
            theirs,
            context.rank,
            list(pids),
            CHUNK_NBYTES,
            TWO_SHOT_NBYTES,
            context.wait_timeout_s,
            _SPINS_CROWDED if crowded else _SPINS,
        )
        # The first rank's descriptor stays until everybody has it open.
        context.control.barrier()
    except BaseException:
        # The exception's traceback keeps this frame, and the frame would keep the mapping.
        run = round_trip = None
        raise
    finally:
        for descriptor in (mine, theirs):
            if descriptor >= 0:
                os.close(descriptor)
    return Session(run, round_trip, nbytes, pids, context)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    if out is None:
        out = torch.empty_like(tensor)
    culprit = session.run(tensor.data_ptr(), out.data_ptr(), tensor.numel(), _CODES[tensor.dtype])
    if culprit:
        session.fail(culprit - 1)
    return out


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Unmap the segment; its memory goes back with the last rank's."""
    session.release()


def _timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, as the mean of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _create(name: str, nbytes: int) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    # Nobody can cut it short under the others, whose next access would be a bus error.
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def _open(pid: int, descriptor: int, name: str) -> int:
    """Another process's segment: an ordinary open, which the kernel allows to the same user alone."""
    path = f"/proc/{pid}/fd/{descriptor}"
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    found = str(Path(f"/proc/self/fd/{opened}").readlink())
    if found != f"/memfd:{name} (deleted)":
        os.close(opened)
        raise ConnectionError(f"{path} is {found}, not the first rank's segment: the ranks are on different machines")
    return opened


def _ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie."""
    try:
        # The state follows the name, which is in parentheses and may hold any character.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True
