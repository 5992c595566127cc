"""Which groups and messages FlashInfer's one-shot kernel serves, and how much memory its workspace needs. Pure."""

from __future__ import annotations

import functools

import comm_core as comm
from comm_core import eligibility

__all__ = [
    "DTYPES",
    "ITEMSIZE",
    "MAX_NBYTES",
    "PRIORITY",
    "fits_kernel",
    "max_tokens",
    "prepared_range",
    "ranges",
    "unavailable_reason",
    "workspace_nbytes",
]

_NAME = "flashinfer_fusion"
#: Of this backend among all: generic custom kernels.
PRIORITY = 200
#: The compute capabilities that are served, 9.x and 10.x: from the first one on, below the second one.
OLDEST, BELOW = (9, 0), (11, 0)
#: Both half precisions: they share a workspace.
DTYPES = ("float16", "bfloat16")
#: The size of an element of these dtypes, in bytes.
ITEMSIZE = 2
#: The largest message by world size, in bytes. FlashInfer has kernels for these world sizes, and for 16 ranks. For two
#: ranks: up to here it was faster than NCCL's all-reduce alone wherever both were timed, up to 512 tokens of 7,168 (two
#: H200, torch 2.11, NCCL 2.28.9, in graphs). For more ranks, which weren't timed: vLLM's limits for this kernel on
#: compute capability 9.0. FlashInfer's two-shot algorithm isn't used: it was slower than this one wherever both were
#: timed, and at 2,048 tokens of 4,096 slower than NCCL's all-reduce alone.
MAX_NBYTES = {2: 8 << 20, 4: 2 << 20, 8: 1 << 20}

# The kernel's launch: a thread's bytes of a row, the most threads of a block, the most blocks of a cluster. The kernel
# allows 1,024 threads if its registers suffice; 512 threads have 128 registers each.
_VECTOR_NBYTES = 16
_MAX_THREADS = 512
_MAX_BLOCKS = 8
# The flags that a rank keeps for each peer, in bytes.
_FLAGS_NBYTES = 256 * 4
# FlashInfer pads each of the three buffers and rounds it up to the granularity, both in bytes.
_GRANULARITY_NBYTES = 2 << 20
_PAD_NBYTES = 2048


def unavailable_reason(topology: comm.Topology) -> str:
    """Say why the group can't be served; "" if it can."""
    return (
        eligibility.no_cuda(topology)
        or eligibility.missing_dependency(topology, _NAME, "FlashInfer")
        or eligibility.differing_fact(topology, _NAME, "version", "FlashInfer's version")
        or eligibility.unfit_world_size(topology, tuple(MAX_NBYTES))
        or eligibility.several_hosts(topology)
        or eligibility.unfit_devices(topology, OLDEST, BELOW)
        or eligibility.missing_links(topology)
    )


def ranges(topology: comm.Topology) -> tuple[comm.Range, ...]:
    """Say what is served once it has been prepared."""
    return (
        comm.Range(
            "all_reduce_add_rms_norm",
            dtypes=DTYPES,
            device_types=("cuda",),
            max_nbytes=MAX_NBYTES[topology.world_size],
            multiple_nbytes=16,
            hidden_multiple=8,
            prepared=True,
        ),
    )


def prepared_range(dtype: str, hidden_size: int, tokens: int) -> comm.Range:
    """Say what is served after messages up to `[tokens, hidden_size]` have been prepared."""
    return comm.Range(
        "all_reduce_add_rms_norm",
        dtypes=(dtype,),
        device_types=("cuda",),
        max_nbytes=tokens * hidden_size * ITEMSIZE,
        max_tokens=tokens,
        hidden_multiple=hidden_size,
        prepared=True,
    )


@functools.lru_cache(maxsize=256)
def fits_kernel(hidden_size: int) -> bool:
    """Say whether the kernel can be launched for rows of `hidden_size` elements.

    A cluster works on a row. It has 1, 2, 4 or 8 blocks: the most that divide the row's threads evenly.
    """
    threads, rest = divmod(hidden_size * ITEMSIZE, _VECTOR_NBYTES)
    blocks = _MAX_BLOCKS
    while blocks > 1 and threads % blocks:
        blocks //= 2
    return not rest and 0 < threads <= blocks * _MAX_THREADS


def max_tokens(world_size: int, hidden_size: int, wanted: int) -> int:
    """Return how many rows of `hidden_size` elements a call may have, `wanted` at most; 0 if none are served."""
    return min(wanted, MAX_NBYTES[world_size] // (hidden_size * ITEMSIZE)) if fits_kernel(hidden_size) else 0


def workspace_nbytes(world_size: int, numel: int) -> int:
    """Return the device memory of a rank's workspace for messages up to `numel` elements, in bytes.

    It has three buffers: every rank's message for the two-shot algorithm, flags, and every rank's message three times
    for the one-shot algorithm, as FlashInfer documents at `trtllm_create_ipc_workspace_for_all_reduce_fusion`.
    """
    message = world_size * numel * ITEMSIZE
    return sum(_rounded_up(nbytes) for nbytes in (message, world_size * _FLAGS_NBYTES, 3 * message))


def _rounded_up(nbytes: int) -> int:
    return -(-(nbytes + _PAD_NBYTES) // _GRANULARITY_NBYTES) * _GRANULARITY_NBYTES
