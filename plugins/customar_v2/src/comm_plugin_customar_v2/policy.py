"""Which groups are served, and which algorithm and launch shape serve which size.

Pure: results depend only on arguments, so every rank decides the same. `parse` reads the environment by default.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import comm_core as comm
from comm_core import eligibility
from comm_core.launch_rows import LaunchRow, flat, read_option

__all__ = [
    "ALGORITHMS",
    "DTYPES",
    "OPTION",
    "PRIORITY",
    "VEC_NBYTES",
    "WIRE_ALGORITHMS",
    "WIRE_FROM_NBYTES",
    "Row",
    "flat",
    "forced_row",
    "major",
    "needs_fabric",
    "parse",
    "parse_row",
    "ranges",
    "rows_for",
    "unavailable_reason",
    "wire_rows_for",
]

_NAME = "customar_v2"
#: Of this backend among all: made for this topology.
PRIORITY = 300
DTYPES = ("float32", "float16", "bfloat16")
#: `kVecNbytes` in comm_core/vec.cuh.
VEC_NBYTES = 16
#: `kMaxRanks` in csrc/params.cuh.
MAX_RANKS = 8
#: The oldest compute capability that has kernels.
OLDEST = (8, 0)
#: `Algorithm` in csrc/params.cuh.
ALGORITHMS = {"oneshot_push": 0, "oneshot_stream": 1, "twoshot_push": 2}
#: Those that send FP8, for groups with that wire: the first for more than two ranks, the second for two.
WIRE_ALGORITHMS = {"twoshot_push_fp8": 3, "oneshot_push_fp8": 4}
#: The smallest message that travels over the FP8 wire, in bytes. Below, latency counts more than bytes do.
WIRE_FROM_NBYTES = 1 << 20
# The oldest compute capability that converts from and to FP8.
_OLDEST_WIRE = (8, 9)
#: The environment variable that forces one algorithm for all sizes and, after a colon, its launch shape:
#: "twoshot_push:vecs=4,threads=256,blocks=264,pipeline_depth=1".
OPTION = "COMM_CORE_CUSTOMAR_V2_ALGORITHM"

_KIB, _MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True)
class Row(LaunchRow):
    """The algorithm and launch shape that serve messages up to a size.

    The fields have the order of `Shape` in csrc/session.cuh.

    Attributes:
        up_to_nbytes: the largest message, in bytes.
        algorithm: one of `ALGORITHMS`, or of `WIRE_ALGORITHMS`.
        vecs: the vectors of 16 bytes that a thread has in flight: 1, 2 or 4 for two ranks, 1 for more and with FP8.
        threads: the threads of a block, a multiple of 32.
        blocks: the largest grid. A grid is never larger than the message needs, or than the device holds at once.
        pipeline_depth: the number of rounds by which pushes run ahead of sums, in algorithms that let them.
    """

    codes = ALGORITHMS | WIRE_ALGORITHMS
    vecs: int = 1
    threads: int = 256
    blocks: int = 264
    pipeline_depth: int = 0


# Two ranks on Hopper, measured on two H200 joined by 18 NVLinks (torch 2.11, CUDA 13.0, 2026-11-22; bfloat16, graphs of
# dependent calls, benchmarks/2026-11-22-h200x2-customar_v2_tune.json), and again with comm-core tune on 2026-11-30
# (benchmarks/2026-11-30-h200x2-tune.json). Beside each row stand the sizes measured last and how much slower the row
# was, at most, than the fastest of all shapes. One-shot rows end at the size that fills the grid, because one-shot is
# fastest in a single round.
_HOPPER_2 = (
    Row(4 * _KIB, "oneshot_push", threads=256),  # 1 to 4 KiB: 0.5 %
    Row(264 * 64 * 16, "oneshot_push", threads=64),  # 6 to 256 KiB: 2.0 %
    Row(264 * 128 * 16, "oneshot_push", threads=128),  # 384 and 512 KiB: 0.0 %
    Row(264 * 256 * 16, "oneshot_push", threads=256),  # 768 KiB and 1 MiB: 3.1 %
    Row(264 * 512 * 16, "oneshot_push", threads=512),  # 1.5 and 2 MiB: 0.0 %
    Row(5 * _MIB, "twoshot_push", threads=512, pipeline_depth=2),  # 3 and 4 MiB: 1.9 %
    Row(10 * _MIB, "twoshot_push", vecs=2, threads=512, pipeline_depth=2),  # 6 and 8 MiB: 0.0 %
    Row(24 * _MIB, "twoshot_push", threads=512, pipeline_depth=2),  # 12 to 24 MiB: 0.4 %
    Row(64 * _MIB, "oneshot_stream", vecs=2, threads=512, pipeline_depth=2),  # 32 to 64 MiB: 1.0 %
)
# Three and four ranks likewise, on four H200 joined to a switch by 18 NVLinks each, up to 8 MiB. NCCL serves larger
# messages: it may let the switch sum (NVLS), which wasn't measured.
_HOPPER_3 = (
    Row(64 * _KIB, "oneshot_push", threads=64),  # 1 to 64 KiB: 1.3 %
    Row(384 * _KIB, "oneshot_push", threads=128),  # 128 to 384 KiB: 0.5 %
    Row(768 * _KIB, "twoshot_push", threads=64),  # 512 and 768 KiB: 0.0 %
    Row(2 * _MIB, "twoshot_push", threads=512, pipeline_depth=1),  # 1 and 2 MiB: 0.2 %
    Row(8 * _MIB, "twoshot_push", threads=512, pipeline_depth=2),  # 4 and 8 MiB: 0.4 %
)
_HOPPER_4 = (
    Row(64 * _KIB, "oneshot_push", threads=64),  # 1 to 64 KiB: 1.2 %
    Row(256 * _KIB, "oneshot_push", threads=128),  # 128 and 256 KiB: 0.0 %
    Row(768 * _KIB, "twoshot_push", threads=64),  # 384 to 768 KiB: 0.1 %
    Row(1 * _MIB, "twoshot_push", threads=128),  # 1 MiB: 0.5 %
    Row(2 * _MIB, "twoshot_push", threads=512),  # 2 MiB: 0.0 %
    Row(8 * _MIB, "twoshot_push", threads=512, pipeline_depth=1),  # 4 and 8 MiB: 0.0 %
)
# All other groups are unmeasured: one-shot up to the size at which two-shot takes as long, then two-shot up to 8 MiB;
# NCCL serves larger messages. On H200 that size is some 450 KiB for three ranks and 320 KiB for four. With more ranks
# it shrinks, as one-shot sends more bytes than two-shot by (W - 1) - 2 (W - 1) / W of the message.
_ONE_SHOT_NBYTES = {2: _MIB, 3: 384 * _KIB, 4: 256 * _KIB, 5: 192 * _KIB}

# Sums over an FP8 wire. Two ranks on Hopper, measured likewise on 2026-11-30: 144 shapes, of which the ten best again
# at more sizes; benchmarks/2026-11-30-h200x2-wire.json has the table's times. A round of 528 blocks of 256 threads
# takes 4.125 MiB, and two rounds of 264 blocks of 384 threads take 6.1875 MiB.
_WIRE_HOPPER_2 = (
    Row(2 * _MIB, "oneshot_push_fp8", threads=128, blocks=528),  # 1 to 2 MiB: 0.1 %
    Row(528 * 256 * 32, "oneshot_push_fp8", threads=256, blocks=528),  # 2.5 to 4 MiB: 0.0 %
    Row(2 * 264 * 384 * 32, "oneshot_push_fp8", threads=384),  # 5 MiB: 3.0 %; 6 MiB: 0.0 %
    Row(64 * _MIB, "oneshot_push_fp8", threads=1024),  # 7 to 64 MiB: 1.2 %
)
# All others are unmeasured.
_WIRE_2 = (Row(8 * _MIB, "oneshot_push_fp8", threads=256, blocks=128),)
_WIRE_OTHERS = (Row(8 * _MIB, "twoshot_push_fp8", threads=256, blocks=128, pipeline_depth=1),)

# By compute capability's major number and world size; graphs and eager calls alike.
_TABLES: dict[tuple[int, int], tuple[Row, ...]] = {(9, 2): _HOPPER_2, (9, 3): _HOPPER_3, (9, 4): _HOPPER_4}


def unavailable_reason(topology: comm.Topology) -> str:
    """Say why the group can't be served; "" if it can."""
    return (
        eligibility.no_cuda(topology)
        or eligibility.unfit_world_size(topology, range(2, MAX_RANKS + 1))
        or eligibility.missing_dependency(topology, _NAME)
        or eligibility.differing_fact(topology, _NAME, "forced", OPTION)
        or eligibility.unfit_devices(topology, OLDEST)
        or _unfit_links(topology)
    )


def _unfit_links(topology: comm.Topology) -> str:
    """Require NVLink and peer access between every two ranks: on one machine, or in one NVLink clique of several."""
    unshared = eligibility.unshared_memory(topology)
    if not unshared:
        return eligibility.missing_links(topology)
    fabrics = {info.device.fabric for info in topology.ranks if info.device is not None}
    clique = len(fabrics) == 1 and None not in fabrics
    return "" if clique else f"{unshared}, and they share no NVLink clique"


def needs_fabric(topology: comm.Topology) -> bool:
    """Return whether the ranks of a group that is served share memory by fabric handles."""
    return bool(eligibility.unshared_memory(topology))


def ranges(topology: comm.Topology) -> tuple[comm.Range, ...]:
    """Say what is served: plain messages of any number of elements; fused ones with rows of whole vectors."""
    # The fused tables go as far as the plain ones. No plain kernel reads or writes beyond the last element.
    largest = rows_for(major(topology), topology.world_size)[-1].up_to_nbytes
    plain = comm.Range("all_reduce", dtypes=DTYPES, device_types=("cuda",), max_nbytes=largest)
    fused = (
        comm.Range(
            "all_reduce_add_rms_norm",
            dtypes=dtypes,
            device_types=("cuda",),
            max_nbytes=largest,
            hidden_multiple=VEC_NBYTES // itemsize,
        )
        for dtypes, itemsize in ((DTYPES[:1], 4), (DTYPES[1:], 2))
    )
    quantized = comm.Range(
        "all_reduce_add_rms_norm_quant",
        dtypes=DTYPES[1:],
        device_types=("cuda",),
        max_nbytes=largest,
        hidden_multiple=VEC_NBYTES // 2,
    )
    if _capability(topology) < _OLDEST_WIRE:
        return (plain, *fused, quantized)
    wire = comm.Range(
        "all_reduce",
        dtypes=DTYPES[1:],
        device_types=("cuda",),
        min_nbytes=WIRE_FROM_NBYTES,
        max_nbytes=wire_rows_for(major(topology), topology.world_size)[-1].up_to_nbytes,
        wire="fp8",
    )
    return (plain, *fused, quantized, wire)


def major(topology: comm.Topology) -> int:
    """Return the major version of the devices' compute capability; 0 without a device."""
    return _capability(topology)[0]


def _capability(topology: comm.Topology) -> tuple[int, int]:
    device = topology.ranks[0].device
    return (0, 0) if device is None else device.capability


def forced_row(topology: comm.Topology) -> Row | None:
    """Return the row that the option forces, as rank 0's `probe` reported it; None: the table decides."""
    numbers = topology.ranks[0].facts[_NAME]["forced"]
    return None if numbers is None else Row.from_numbers(numbers)


def rows_for(major: int, world_size: int, forced: Row | None = None) -> tuple[Row, ...]:
    """Return the table of a group, sizes ascending; messages larger than its last row aren't served.

    Args:
        major: the major version of the devices' compute capability.
        world_size: the number of ranks.
        forced: the row that the option forces; None: the table decides.
    """
    rows = _TABLES.get((major, world_size)) or _conservative(world_size)
    return rows if forced is None else (dataclasses.replace(forced, up_to_nbytes=rows[-1].up_to_nbytes),)


def wire_rows_for(major: int, world_size: int) -> tuple[Row, ...]:
    """Return the table of plain sums from `WIRE_FROM_NBYTES` on, in groups with the FP8 wire; see `rows_for`."""
    return _WIRE_OTHERS if world_size > 2 else _WIRE_HOPPER_2 if major == 9 else _WIRE_2


def _conservative(world_size: int) -> tuple[Row, ...]:
    return (
        Row(_ONE_SHOT_NBYTES.get(world_size, 128 * _KIB), "oneshot_push", threads=128, blocks=128),
        Row(8 * _MIB, "twoshot_push", threads=256, blocks=128),
    )


def parse(environ: Mapping[str, str] | None = None) -> Row | None:
    """Read `OPTION`; None if it is unset or empty.

    Raises:
        ValueError: it can't be parsed, or no block has that shape.
    """
    return read_option(OPTION, os.environ if environ is None else environ, parse_row)


def parse_row(text: str) -> Row:
    """Parse a row's text, "algorithm" or "algorithm:vecs=..,threads=..,blocks=..,pipeline_depth=..".

    Raises:
        ValueError: it can't be parsed, or no block has that shape.
    """
    row = Row.parse(text, ALGORITHMS)
    if row.threads % 32 or not 32 <= row.threads <= 1024 or row.blocks < 1 or row.vecs not in (1, 2, 4):
        raise ValueError(f"{text!r}: vecs is 1, 2 or 4, threads a multiple of 32 up to 1024, and blocks at least 1")
    return row
