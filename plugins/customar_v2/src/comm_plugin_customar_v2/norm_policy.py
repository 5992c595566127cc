"""Which algorithm and launch shape serve which fused message: all-reduce, residual and RMSNorm in one call.

Pure, as `policy`. csrc/norm_session.cuh derives the threads of a block from the length of a message's row: its number
of vectors, divided by the `cluster` and `vecs` of the `NormRow` that serves the message. If a block can't have so many
threads, it raises `vecs`, then `cluster`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from comm_core.launch_rows import LaunchRow, flat

from comm_plugin_customar_v2 import policy

__all__ = ["ALGORITHMS", "NormRow", "flat", "parse_row", "rows_for", "slot_rows"]

#: `NormAlgorithm` in csrc/norm.cuh.
ALGORITHMS = {"oneshot_push_norm": 0, "twoshot_push_norm": 1, "separate": 2}
# The plain algorithm that divides a buffer into the same slots.
_SLOTS = {"oneshot_push_norm": "oneshot_push", "twoshot_push_norm": "twoshot_push"}

_KIB, _MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True)
class NormRow(LaunchRow):
    """The algorithm and launch shape that serve fused messages up to a size.

    The fields have the order of `NormShape` in csrc/norm_session.cuh.

    Attributes:
        up_to_nbytes: the largest message, in bytes of the tensor that is reduced.
        algorithm: one of `ALGORITHMS`; "separate" is a plain all-reduce by its own table, then a kernel for the norm.
        vecs: the vectors of 16 bytes that a thread holds of a row, at least: for two ranks 1, 2 or, in one-shot, 4; for
            more ranks 2.
        cluster: the blocks that share a row, at least: 1, 2, 4 or 8; only 1 below compute capability 9.0.
        blocks: the largest grid. A grid is never larger than the message needs, or than the device holds at once.
        pipeline_depth: the number of rounds by which shares run ahead of sums, in two-shot.
    """

    codes = ALGORITHMS
    vecs: int = 1
    cluster: int = 1
    blocks: int = 1056
    pipeline_depth: int = 0


# Two ranks on Hopper, measured on two H200 joined by 18 NVLinks (torch 2.11, CUDA 13.0, 2026-11-22; bfloat16, graphs of
# dependent calls, benchmarks/2026-11-22-h200x2-customar_v2_tune_norm.json) for 1 to 2048 tokens of 2880, 4096, 5120 and
# 7168, and from 592 KiB on by comm-core tune on 2026-11-30, for rows of 4096 and 7168
# (benchmarks/2026-11-30-h200x2-tune.json). Beside each row stands how much slower it was than the fastest of all fused
# shapes: in the mean, and at most. Blocks share a row as long as the clusters of all rows fit the device at once.
_HOPPER_2 = (
    NormRow(592 * _KIB, "oneshot_push_norm", cluster=8),  # 0.4 % in the mean, 3 % at 8 x 2880
    NormRow(1664 * _KIB, "oneshot_push_norm", cluster=4),  # 0.0 %
    NormRow(4736 * _KIB, "oneshot_push_norm", cluster=2),  # 0.9 % in the mean, 4 % at 192 x 7168
    NormRow(9472 * _KIB, "oneshot_push_norm", vecs=2, cluster=2),  # 0.0 % in the mean, 0.2 % at 768 x 4096
    NormRow(64 * _MIB, "twoshot_push_norm", vecs=2, blocks=528),  # 0.5 % in the mean, 0.9 % at 1536 x 7168
)

# Three and four ranks likewise, on four H200, up to 8 MiB as the plain tables. For one message, 64 x 5120 on four
# ranks, "separate" was 1 % faster than the row here. It isn't used, since its bits would differ from its neighbours'.
_HOPPER_3 = (
    NormRow(240 * _KIB, "oneshot_push_norm", vecs=2, cluster=4),  # 1.2 % in the mean, 4 % at 16 x 7168
    NormRow(480 * _KIB, "oneshot_push_norm", vecs=2, cluster=2),  # 0.8 % in the mean, 1 % at 64 x 2880
    NormRow(960 * _KIB, "twoshot_push_norm", vecs=2, cluster=2),  # 3.7 % in the mean, 12 % at 128 x 2880
    NormRow(2 * _MIB, "twoshot_push_norm", vecs=2, cluster=8),  # 1.3 % in the mean, 4 % at 128 x 5120
    NormRow(8 * _MIB, "twoshot_push_norm", vecs=2, cluster=2),  # 2.1 % in the mean, 6 % at 256 x 5120
)
_HOPPER_4 = (
    NormRow(240 * _KIB, "oneshot_push_norm", vecs=2, cluster=4),  # 1.2 % in the mean, 3 % at 16 x 7168
    NormRow(340 * _KIB, "oneshot_push_norm", vecs=2, cluster=2),  # 0.2 % in the mean, 1 % at 33 x 4096
    NormRow(2 * _MIB, "twoshot_push_norm", vecs=2, cluster=8),  # 0.4 % in the mean, 4 % at 128 x 5120
    NormRow(8 * _MIB, "twoshot_push_norm", vecs=2),  # 0.0 %
)

# By compute capability's major number and world size; graphs and eager calls alike.
_TABLES: dict[tuple[int, int], tuple[NormRow, ...]] = {(9, 2): _HOPPER_2, (9, 3): _HOPPER_3, (9, 4): _HOPPER_4}


def rows_for(major: int, world_size: int) -> tuple[NormRow, ...]:
    """Return the fused table of a group, sizes ascending, up to the largest message of the plain one.

    Args:
        major: the major version of the devices' compute capability.
        world_size: the number of ranks.
    """
    return _TABLES.get((major, world_size)) or _conservative(major, world_size)


def _conservative(major: int, world_size: int) -> tuple[NormRow, ...]:
    """Return one-shot up to the size at which the plain table's ends, then two-shot."""
    plain = policy.rows_for(major, world_size)
    one_shot = max(row.up_to_nbytes for row in plain if row.algorithm == "oneshot_push")
    # With more than two ranks, one-shot sends a row to several peers, and one multiprocessor is slow at that.
    cluster = 4 if major >= 9 and world_size > 2 else 1
    return (
        NormRow(one_shot, "oneshot_push_norm", vecs=2, cluster=cluster),
        NormRow(plain[-1].up_to_nbytes, "twoshot_push_norm", vecs=2),
    )


def parse_row(text: str) -> NormRow:
    """Parse the text of a fused kernel's row, "algorithm:vecs=..,cluster=..,blocks=..,pipeline_depth=..".

    Raises:
        ValueError: it can't be parsed, or no cluster has that shape.
    """
    row = NormRow.parse(text, _SLOTS)  # not "separate", since that rounds once more
    if row.vecs not in (1, 2, 4) or row.cluster not in (1, 2, 4, 8) or row.blocks < row.cluster:
        raise ValueError(f"{text!r}: vecs is 1, 2 or 4, cluster 1, 2, 4 or 8, and blocks at least cluster")
    return row


def slot_rows(rows: Sequence[NormRow]) -> list[policy.Row]:
    """Return plain rows with slots large enough for the fused rows' messages."""
    return [policy.Row(row.up_to_nbytes, _SLOTS[row.algorithm]) for row in rows if row.algorithm in _SLOTS]
