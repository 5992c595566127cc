"""Which algorithm, in which shape of launch, serves which fused message: all-reduce, residual and RMSNorm in one call.

Pure, as `policy`. The threads of a block follow from the row's length, in csrc/norm_session.cuh: as many as the row has
vectors, over the blocks and the vectors a thread of its row of the table, or more of these where a block couldn't have
so many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from comm_plugin_customar_v2 import policy

__all__ = ["ALGORITHMS", "NormRow", "flat", "needs", "rows_for"]

#: `NormAlgorithm` in csrc/norm.cuh, and for each the plain algorithm whose slots it takes.
ALGORITHMS = {"oneshot_push_norm": 0, "twoshot_push_norm": 1, "separate": 2}
_SLOTS = {"oneshot_push_norm": "oneshot_push", "twoshot_push_norm": "twoshot_push"}

_KIB, _MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True)
class NormRow:
    """How fused messages up to a size are served.

    Attributes:
        up_to_nbytes: the largest message, in bytes of the tensor that is reduced.
        algorithm: one of `ALGORITHMS`; "separate" is what the plain table says, then a kernel of its own for the norm.
        vecs: vectors of 16 bytes that a thread has of a row, or more where a block couldn't take the row: 1, 2 or, in
            one shot, 4; beyond two ranks always 2.
        cluster: blocks that share a row, or more where so many couldn't take the row: 1, 2, 4 or 8; above 1 from
            compute capability 9.0 on.
        blocks: the most of a grid, which is otherwise as large as the message needs, and the device can hold at once.
        pipeline_depth: rounds that shares are ahead of sums, in two shots.
    """

    up_to_nbytes: int
    algorithm: str
    vecs: int = 1
    cluster: int = 1
    blocks: int = 1056
    pipeline_depth: int = 0

    def numbers(self) -> tuple[int, ...]:
        """As `NormShape` in csrc/norm_session.cuh has them."""
        code = ALGORITHMS[self.algorithm]
        return (self.up_to_nbytes, code, self.vecs, self.cluster, self.blocks, self.pipeline_depth)


# Two ranks on Hopper. Every row was measured on two H200 that NVLink joins by 18 links (torch 2.11, CUDA 13.0,
# 2026-11-22; bfloat16, graphs of dependent calls, benchmarks/customar_v2_tune_norm.py), for 1 to 2048 tokens of 2880,
# 4096, 5120 and 7168; there it was slower than the fastest of all fused shapes by no more than what stands after it.
# Blocks share a row as long as all clusters of all rows have room on the device at once.
_HOPPER_2 = (
    NormRow(512 * _KIB, "oneshot_push_norm", cluster=8),  # 0.4 % in the mean, 3 % at 8 x 2880
    NormRow(2 * _MIB, "oneshot_push_norm", cluster=2),  # 0.6 % in the mean, 2 % at 128 x 2880
    NormRow(64 * _MIB, "twoshot_push_norm", vecs=2, blocks=528),  # 1.6 % in the mean, 5 % at 512 x 5120
)

# Three and four, likewise, on four H200, up to 8 MiB as the plain tables. Of one message, 64 x 5120 on four ranks, the
# separate way was 1 % faster than its row; it would have other bits than its neighbours.
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
    NormRow(2 * _MIB, "twoshot_push_norm", vecs=2, cluster=8),  # 0.5 % in the mean, 4 % at 128 x 5120
    NormRow(8 * _MIB, "twoshot_push_norm", vecs=2),  # 0.0 %
)

# By compute capability's major number and world size; graphs and eager calls alike.
_TABLES: dict[tuple[int, int], tuple[NormRow, ...]] = {(9, 2): _HOPPER_2, (9, 3): _HOPPER_3, (9, 4): _HOPPER_4}


def rows_for(major: int, world_size: int) -> tuple[NormRow, ...]:
    """The fused table of one kind of group, sizes ascending, as far as the plain one goes.

    Args:
        major: of the devices' compute capability.
        world_size: ranks in the group.
    """
    return _TABLES.get((major, world_size)) or _conservative(major, world_size)


def _conservative(major: int, world_size: int) -> tuple[NormRow, ...]:
    """One shot as long as the plain table's, then two.

    Beyond two ranks one shot sends a row to several peers, more than one multiprocessor sends quickly: there a cluster
    shares it.
    """
    plain = policy.rows_for(major, world_size)
    one = max(row.up_to_nbytes for row in plain if row.algorithm == "oneshot_push")
    two = plain[-1].up_to_nbytes
    many = major >= 9 and world_size > 2
    return (
        NormRow(one, "oneshot_push_norm", vecs=2, cluster=4 if many else 1),
        NormRow(two, "twoshot_push_norm", vecs=2),
    )


def needs(rows: Sequence[NormRow]) -> list[policy.Row]:
    """Plain rows whose slots the fused rows' messages have room in."""
    return [policy.Row(row.up_to_nbytes, _SLOTS[row.algorithm]) for row in rows if row.algorithm in _SLOTS]


def flat(rows: Sequence[NormRow]) -> list[int]:
    """The rows' numbers, one after the other, as the native code takes them."""
    return [number for row in rows for number in row.numbers()]
