"""Which algorithm, in which shape of launch, serves which size: the table, and the option that overrides it.

Pure: what it returns depends on its arguments alone, so that every rank has the same table.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from comm_core import Topology, eligibility

__all__ = ["ALGORITHMS", "OPTION", "Row", "parse", "rows_for", "unavailable_reason"]


_NAME = "customar_v2"
#: `kMaxRanks` in csrc/params.cuh.
MAX_RANKS = 8
#: The oldest compute capability that there are kernels for.
OLDEST = (8, 0)
#: `Algorithm` in csrc/params.cuh.
ALGORITHMS = {"oneshot_push": 0, "oneshot_stream": 1, "twoshot_push": 2}
#: The variable that forces one algorithm and, after a colon, its shape: "twoshot_push:vecs=4,threads=256,blocks=264".
OPTION = "COMM_CORE_CUSTOMAR_V2_ALGORITHM"

_KIB, _MIB = 1 << 10, 1 << 20
# Of each number in the option; a shape that some device may have is far below.
_MOST = 1 << 16


@dataclasses.dataclass(frozen=True)
class Row:
    """How messages up to a size are served.

    Attributes:
        up_to_nbytes: the largest message, in bytes.
        algorithm: one of `ALGORITHMS`.
        vecs: vectors of 16 bytes that a thread has in flight: 1, 2 or 4; beyond two ranks 1.
        threads: of a block, a multiple of 32.
        blocks: the most of a grid, which is otherwise as large as the message needs, and the device can hold at once.
        pipeline_depth: rounds that pushes are ahead of sums, where the algorithm has rounds.
    """

    up_to_nbytes: int
    algorithm: str
    vecs: int = 1
    threads: int = 256
    blocks: int = 264
    pipeline_depth: int = 0

    def numbers(self) -> tuple[int, ...]:
        """As `Shape` in csrc/session.cuh has them."""
        code = ALGORITHMS[self.algorithm]
        return (self.up_to_nbytes, code, self.vecs, self.threads, self.blocks, self.pipeline_depth)


# Two ranks on Hopper. Every row was measured on two H200 that NVLink joins by 18 links (torch 2.11, CUDA 13.0,
# 2026-11-22; bfloat16, graphs of dependent calls, benchmarks/customar_v2_tune.py), at the powers of two beside it;
# there it was slower than the fastest of all shapes by no more than what stands after them. One-shot rows end where
# the grid is full: one round is what they are good at.
_HOPPER_2 = (
    Row(4 * _KIB, "oneshot_push", threads=256),  # 1 to 4 KiB: 0.6 %
    Row(64 * _KIB, "oneshot_push", threads=64),  # 8 to 64 KiB: 0.6 %
    Row(264 * 128 * 16, "oneshot_push", threads=128),  # 128 to 512 KiB: 0.0 %
    Row(264 * 256 * 16, "oneshot_push", threads=256),  # 1 MiB: 0.0 %
    Row(264 * 512 * 16, "oneshot_push", threads=512),  # 2 MiB: 0.0 %
    Row(24 * _MIB, "twoshot_push", threads=512, pipeline_depth=2),  # 4 to 16 MiB: 1.1 %
    Row(64 * _MIB, "oneshot_stream", vecs=2, threads=512, pipeline_depth=2),  # 32 and 64 MiB: 0.0 %
)
# Three and four, likewise, on four H200 that a switch joins by 18 links each, up to 8 MiB. Beyond that NCCL may let the
# switch sum (NVLS), which wasn't measured: there the vendor's library is next.
_HOPPER_3 = (
    Row(64 * _KIB, "oneshot_push", threads=64),  # 1 to 64 KiB: 1.2 %
    Row(384 * _KIB, "oneshot_push", threads=128),  # 128 to 384 KiB: 0.5 %
    Row(768 * _KIB, "twoshot_push", threads=64),  # 512 and 768 KiB: 0.0 %
    Row(2 * _MIB, "twoshot_push", threads=512, pipeline_depth=1),  # 1 and 2 MiB: 0.2 %
    Row(8 * _MIB, "twoshot_push", threads=512, pipeline_depth=2),  # 4 and 8 MiB: 0.4 %
)
_HOPPER_4 = (
    Row(64 * _KIB, "oneshot_push", threads=64),  # 1 to 64 KiB: 1.2 %
    Row(256 * _KIB, "oneshot_push", threads=128),  # 128 and 256 KiB: 0.0 %
    Row(768 * _KIB, "twoshot_push", threads=64),  # 384 to 768 KiB: 0.0 %
    Row(1 * _MIB, "twoshot_push", threads=128),  # 1 MiB: 0.4 %
    Row(2 * _MIB, "twoshot_push", threads=512),  # 2 MiB: 0.0 %
    Row(8 * _MIB, "twoshot_push", threads=512, pipeline_depth=1),  # 4 and 8 MiB: 0.0 %
)
# Everything else: unmeasured. One shot up to where two take as long: on H200 some 450 KiB for three ranks and 320 for
# four, beyond that the less the more bytes one shot sends than two, (W - 1) - 2 (W - 1) / W of the message; then two,
# and beyond 8 MiB the vendor's library.
_ONE_SHOT_NBYTES = {2: _MIB, 3: 384 * _KIB, 4: 256 * _KIB, 5: 192 * _KIB}

# By compute capability's major number and world size; graphs and eager calls alike.
_TABLES: dict[tuple[int, int], tuple[Row, ...]] = {(9, 2): _HOPPER_2, (9, 3): _HOPPER_3, (9, 4): _HOPPER_4}


def rows_for(major: int, world_size: int, forced: Row | None = None) -> tuple[Row, ...]:
    """The table of one kind of group, sizes ascending; messages beyond its last row aren't served.

    Args:
        major: of the devices' compute capability.
        world_size: ranks in the group.
        forced: what `parse` read; None: the table decides.
    """
    rows = _TABLES.get((major, world_size)) or _conservative(world_size)
    return rows if forced is None else (dataclasses.replace(forced, up_to_nbytes=rows[-1].up_to_nbytes),)


def _conservative(world_size: int) -> tuple[Row, ...]:
    return (
        Row(_ONE_SHOT_NBYTES.get(world_size, 128 * _KIB), "oneshot_push", threads=128, blocks=128),
        Row(8 * _MIB, "twoshot_push", threads=256, blocks=128),
    )


def parse(environ: Mapping[str, str] | None = None) -> Row | None:
    """What `OPTION` says; None where it is unset or empty.

    Raises:
        ValueError: it can't be read.
    """
    text = (os.environ if environ is None else environ).get(OPTION, "").strip()
    return parse_row(text) if text else None


def parse_row(text: str) -> Row:
    """A row from its text, "algorithm" or "algorithm:vecs=..,threads=..,blocks=..,pipeline_depth=..".

    Raises:
        ValueError: it can't be read.
    """
    algorithm, _, shape = text.partition(":")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{OPTION}={text!r}: {algorithm!r} is none of {', '.join(ALGORITHMS)}")
    values: dict[str, int] = {}
    for item in filter(None, shape.split(",")):
        name, _, number = item.partition("=")
        if name not in ("vecs", "threads", "blocks", "pipeline_depth") or not number.isdecimal():
            raise ValueError(
                f"{OPTION}={text!r}: {item!r} isn't vecs=, threads=, blocks= or pipeline_depth= with a number"
            )
        values[name] = min(int(number), _MOST)
    row = Row(0, algorithm, **values)
    if row.threads % 32 or not 32 <= row.threads <= 1024 or row.blocks < 1 or row.vecs not in (1, 2, 4):
        raise ValueError(f"{OPTION}={text!r}: no block has that shape")
    return row


def flat(rows: Sequence[Row]) -> list[int]:
    """The rows' numbers, one after the other, as the native code takes them."""
    return [number for row in rows for number in row.numbers()]


def unavailable_reason(topology: Topology) -> str:
    """Say why the group can't be served; "" if it can."""
    return (
        eligibility.no_cuda(topology)
        or eligibility.unfit_world_size(topology, range(2, MAX_RANKS + 1))
        or eligibility.missing_dependency(topology, _NAME)
        or eligibility.differing_fact(topology, _NAME, "forced", OPTION)
        or eligibility.unfit_devices(topology, OLDEST)
        or _unfit_links(topology)
    )


def _unfit_links(topology: Topology) -> str:
    """Require NVLink and peer access between every two ranks: on one host, or in one NVLink clique of several hosts."""
    several = eligibility.several_hosts(topology)
    if not several:
        return eligibility.missing_links(topology)
    fabrics = {info.device.fabric for info in topology.ranks if info.device is not None}
    clique = len(fabrics) == 1 and None not in fabrics
    return "" if clique else f"{several}, and in no NVLink clique in common"
