"""Which messages FlashInfer's one-shot kernel takes, and what its workspace takes of the device. Pure."""

from __future__ import annotations

import functools

__all__ = ["DTYPES", "ITEMSIZE", "MOST_NBYTES", "fits", "most_tokens", "workspace_nbytes"]

#: Both half precisions: they share a workspace.
DTYPES = ("float16", "bfloat16")
#: Bytes of an element of each.
ITEMSIZE = 2
#: The largest message by world size, in bytes. The library has kernels for these sizes, and for 16 ranks. For two:
#: faster than NCCL's all-reduce alone wherever both were timed, up to 512 tokens of 7,168 (two H200, torch 2.11, NCCL
#: 2.28.9, in graphs). For more, where nothing was timed: vLLM's limits for this kernel on compute capability 9.0. The
#: library's other algorithm, of two shots, isn't used: it was slower than this one wherever both were timed, and at
#: 2,048 tokens of 4,096 slower than NCCL's all-reduce alone.
MOST_NBYTES = {2: 8 << 20, 4: 2 << 20, 8: 1 << 20}

# Of the kernel's launch: bytes a thread takes of a row, threads of a block at most, blocks of a cluster at most. It
# allows 1,024 threads, for which its registers have to suffice: half as many have 128 registers each.
_VECTOR_NBYTES = 16
_MOST_THREADS = 512
_MOST_BLOCKS = 8
# Flags that a rank keeps for each peer, in bytes.
_FLAGS_NBYTES = 256 * 4
# What each of the three buffers is rounded up to, and what the library adds to it before, in bytes.
_GRANULARITY_NBYTES = 2 << 20
_PAD_NBYTES = 2048


@functools.lru_cache(maxsize=256)
def fits(hidden_size: int) -> bool:
    """Whether the kernel can be launched for rows of `hidden_size` elements.

    A row is a cluster's: 1, 2, 4 or 8 blocks, as many as divide its threads.
    """
    threads, rest = divmod(hidden_size * ITEMSIZE, _VECTOR_NBYTES)
    blocks = _MOST_BLOCKS
    while blocks > 1 and threads % blocks:
        blocks //= 2
    return not rest and 0 < threads <= blocks * _MOST_THREADS


def most_tokens(world_size: int, hidden_size: int, max_tokens: int) -> int:
    """How many of `max_tokens` rows of `hidden_size` elements a call may have; 0 for none."""
    return min(max_tokens, MOST_NBYTES[world_size] // (hidden_size * ITEMSIZE)) if fits(hidden_size) else 0


def workspace_nbytes(world_size: int, numel: int) -> int:
    """Device memory of a rank's workspace for messages up to `numel` elements, in bytes.

    Every rank's message for the two-shot algorithm, flags, and three times every rank's message for the one-shot one,
    as it documents `trtllm_create_ipc_workspace_for_all_reduce_fusion`.
    """
    message = world_size * numel * ITEMSIZE
    return sum(_rounded_up(nbytes) for nbytes in (message, world_size * _FLAGS_NBYTES, 3 * message))


def _rounded_up(nbytes: int) -> int:
    return -(-(nbytes + _PAD_NBYTES) // _GRANULARITY_NBYTES) * _GRANULARITY_NBYTES
