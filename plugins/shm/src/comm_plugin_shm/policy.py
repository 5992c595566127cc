"""Which groups are served, and the parameters of the protocol. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import comm_core as comm
import torch
from comm_core import eligibility

__all__ = [
    "CHUNK_NBYTES",
    "DTYPE_CODES",
    "MAX_RANKS",
    "PRIORITY",
    "TWO_SHOT_NBYTES",
    "ranges",
    "spins",
    "unavailable_reason",
]

_NAME = "shm"
#: Of this backend among all: made for this topology.
PRIORITY = 300
#: The most ranks of a group: `kMaxRanks` in csrc/protocol.h.
MAX_RANKS = 64
#: The size of a slot, in bytes: two slots fit in the second-level cache of a server's core. Of 128 KiB to 4 MiB it was
#: the fastest for messages from 64 KiB on with two processes, on two cores of an AMD EPYC (Zen 4) with 1 MiB of that
#: cache each.
CHUNK_NBYTES = 512 << 10
#: The smallest message that more than two ranks sum two-shot, in bytes: with four processes on the same two cores,
#: both algorithms took equally long at 8 KiB, and two-shot half as long from 64 KiB on.
TWO_SHOT_NBYTES = 16 << 10
# How often a rank reads a peer's step before it yields the processor. 2,000 reads take about 30 µs: longer than any
# call but the largest, and much shorter than being scheduled again. Where ranks share processors, the peer may be
# waiting for the processor that spins.
_SPINS = 2000
_SPINS_ON_SHARED_PROCESSORS = 20

#: `DType` in csrc/reduce.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 8,
}


def unavailable_reason(topology: comm.Topology) -> str:
    """Say why the group can't be served; "" if it can."""
    if "cpu" not in topology.device_types:
        return "it sums CPU tensors, and this group has none"
    reason = (
        eligibility.several_hosts(topology)
        or eligibility.unfit_world_size(topology, range(2, MAX_RANKS + 1))
        or eligibility.missing_dependency(topology, _NAME)
    )
    if reason:
        return reason
    differing = eligibility.differing_fact(topology, _NAME, "pid_namespace", "the PID namespace")
    return differing and f"its ranks can't see each other's processes: {differing}"


def ranges(topology: comm.Topology) -> tuple[comm.Range, ...]:
    """Say what is served: CPU tensors of any size and dtype."""
    return (comm.Range("all_reduce", modes=("eager",), device_types=("cpu",)),)


def spins(processors: Sequence[Sequence[int]]) -> int:
    """Say how often a rank reads a peer's step before it yields the processor.

    Args:
        processors: the processors that each rank may use; engines give each rank its own.
    """
    together = set[int]().union(*processors)
    return _SPINS_ON_SHARED_PROCESSORS if len(processors) > len(together) else _SPINS
