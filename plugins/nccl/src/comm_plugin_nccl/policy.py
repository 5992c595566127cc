"""Which groups are served, and which messages are summed before a capture. Pure."""

from __future__ import annotations

import comm_core as comm
import torch
from comm_core import eligibility

__all__ = ["DTYPE_CODES", "MAX_WARM_UP_NBYTES", "PRIORITY", "ranges", "unavailable_reason", "warm_up_numels"]

_NAME = "nccl"
#: Of this backend among all: a vendor's library.
PRIORITY = 100
#: `ncclDataType_t` in nccl.h, for every dtype that NCCL sums and core routes.
DTYPE_CODES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
#: The largest message of a warm-up, in bytes: the largest that core's admission test takes from a bounded range.
MAX_WARM_UP_NBYTES = 64 << 20


def unavailable_reason(topology: comm.Topology) -> str:
    """Say why the group can't be served; "" if it can."""
    return (
        eligibility.no_cuda(topology)
        or ("it takes two ranks or more" if topology.world_size < 2 else "")
        or eligibility.shared_device(topology)
        or eligibility.missing_dependency(topology, _NAME, "NCCL")
        # Versions must be equal, not only majors: NCCL itself refuses a group of different versions.
        or eligibility.differing_fact(topology, _NAME, "nccl", "NCCL's version")
    )


def ranges(topology: comm.Topology) -> tuple[comm.Range, ...]:
    """Say what is served: messages of any size."""
    dtypes = tuple(str(dtype) for dtype in DTYPE_CODES)
    return (comm.Range("all_reduce", dtypes=dtypes, device_types=("cuda",)),)


def warm_up_numels(shapes: comm.Shapes) -> tuple[int, ...]:
    """Return how many elements each message of a warm-up has: the powers of two below the largest, and the largest."""
    if shapes.dtype not in DTYPE_CODES:
        return ()
    largest = min(shapes.max_tokens * shapes.hidden_size, MAX_WARM_UP_NBYTES // shapes.dtype.itemsize)
    return (*(1 << exponent for exponent in range((largest - 1).bit_length())), largest)
