"""Which groups are served, and which algorithm and launch shape serve which size.

Pure: results depend only on arguments, so every rank decides the same. `parse` reads the environment by default.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence

import comm_core as comm
from comm_core import eligibility
from comm_core.launch_rows import LaunchRow, flat, read_option
from comm_core.tuning import VariantChoice, overlay

__all__ = [
    "ALGORITHMS",
    "DTYPES",
    "MAX_NBYTES",
    "OPTION",
    "PRIORITY",
    "WORLD_SIZES",
    "Row",
    "flat",
    "forced_row",
    "max_vecs",
    "parse",
    "parse_row",
    "ranges",
    "rows_for",
    "unavailable_reason",
    "variants_of",
    "with_choices",
]

_NAME = "customar_v1"
#: Of this backend among all: generic custom kernels.
PRIORITY = 200
DTYPES = ("float32", "float16", "bfloat16")
#: The oldest compute capability that has kernels.
OLDEST = (8, 0)
#: `Algorithm` in csrc/params.cuh.
ALGORITHMS = {"one_stage": 0, "two_stage": 1}
#: The environment variable that forces one algorithm for all sizes and, after a colon, its launch shape:
#: "two_stage:vecs=2,threads=256,blocks=264".
OPTION = "COMM_CORE_CUSTOMAR_V1_ALGORITHM"
#: The world sizes that have kernels: world*.cu in csrc.
WORLD_SIZES = (2, 4, 6, 8)
_KIB, _MIB = 1 << 10, 1 << 20
#: The largest message, in bytes.
MAX_NBYTES = 8 * _MIB
#: `kMaxThreads` and `kMaxBlocks` in csrc/params.cuh.
MAX_THREADS, MAX_BLOCKS = 512, 512


@dataclasses.dataclass(frozen=True)
class Row(LaunchRow):
    """The algorithm and launch shape that serve messages up to a size.

    The fields have the order of `Shape` in csrc/session.cuh.

    Attributes:
        up_to_nbytes: the largest message, in bytes.
        algorithm: one of `ALGORITHMS`.
        vecs: the vectors of 16 bytes that a thread loads from each rank at once; see `max_vecs`.
        threads: the threads of a block, a multiple of 32 up to `MAX_THREADS`.
        blocks: the largest grid. A grid is never larger than the message needs, or than the device holds at once.
    """

    codes = ALGORITHMS
    vecs: int = 1
    threads: int = 256
    blocks: int = 264


# Two and four ranks: the fastest shapes, or within 2 % of them, of benchmarks/2026-11-22-h200x2-customar_v1_tune.json,
# 2026-11-22-h200x4-customar_v1_tune.json and, below 512 KiB, 2026-11-22-h200x4-customar_v1_tune_small.json (H200,
# graphs of dependent calls, bfloat16). Each block waits for the same block of every peer, which costs more than moving
# the bytes: with two ranks 256 KiB takes 4.3 us in 32 blocks and 5.5 us in 128.
#
# Six and eight ranks are unmeasured: they have the shapes of four ranks, and the one-stage algorithm up to 256 KiB, as
# in vLLM's and SGLang's kernels of this design.
_TABLES: dict[int, tuple[Row, ...]] = {
    2: (
        Row(32 * _KIB, "one_stage", threads=256),
        Row(128 * _KIB, "one_stage", threads=512),
        Row(256 * _KIB, "one_stage", vecs=4, threads=128, blocks=32),
        Row(512 * _KIB, "one_stage", vecs=2, threads=512, blocks=32),
        Row(1 * _MIB, "one_stage", threads=512, blocks=48),
        Row(2 * _MIB, "one_stage", threads=512, blocks=132),
        Row(4 * _MIB, "one_stage", vecs=2, threads=512, blocks=132),
        Row(MAX_NBYTES, "one_stage", vecs=4, threads=256, blocks=132),
    ),
    4: (
        Row(32 * _KIB, "one_stage", threads=256),
        Row(512 * _KIB, "one_stage", threads=512, blocks=32),
        Row(768 * _KIB, "two_stage", threads=256, blocks=48),
        Row(1 * _MIB, "two_stage", threads=512, blocks=32),
        Row(MAX_NBYTES, "two_stage", threads=256, blocks=132),
    ),
    6: (Row(256 * _KIB, "one_stage", threads=512, blocks=32), Row(MAX_NBYTES, "two_stage", threads=256, blocks=132)),
    8: (Row(256 * _KIB, "one_stage", threads=512, blocks=32), Row(MAX_NBYTES, "two_stage", threads=256, blocks=132)),
}


def unavailable_reason(topology: comm.Topology) -> str:
    """Say why the group can't be served; "" if it can."""
    return (
        eligibility.no_cuda(topology)
        or eligibility.unfit_world_size(topology, WORLD_SIZES)
        or eligibility.missing_dependency(topology, _NAME)
        or eligibility.differing_fact(topology, _NAME, "forced", OPTION)
        or _unfit_row(topology)
        or eligibility.unfit_devices(topology, OLDEST)
        or eligibility.unshared_memory(topology)
        or _unfit_links(topology)
    )


def _unfit_row(topology: comm.Topology) -> str:
    row, most = forced_row(topology), max_vecs(topology.world_size)
    if row is None or row.vecs <= most:
        return ""
    return f"{OPTION} asks for vecs={row.vecs}, and with {topology.world_size} ranks the kernels have {most} at most"


def _unfit_links(topology: comm.Topology) -> str:
    # Over PCIe all pairs share the bus, over which each rank would send W - 1 messages. vLLM and SGLang, too, leave
    # more than two ranks without NVLink to NCCL.
    if topology.world_size == 2:
        return eligibility.missing_links(topology, nvlink=False)
    missing = eligibility.missing_links(topology)
    return missing and f"{missing}; more than two ranks need NVLink and peer access between every two"


def ranges(topology: comm.Topology) -> tuple[comm.Range, ...]:
    """Say what is served: any number of elements, since no kernel reads or writes beyond the last one."""
    return (comm.Range("all_reduce", dtypes=DTYPES, device_types=("cuda",), max_nbytes=MAX_NBYTES),)


def forced_row(topology: comm.Topology) -> Row | None:
    """Return the row that the option forces, as rank 0's `probe` reported it; None: the table decides."""
    numbers = topology.ranks[0].facts[_NAME]["forced"]
    return None if numbers is None else Row.from_numbers(numbers)


def rows_for(world_size: int, forced: Row | None = None) -> tuple[Row, ...]:
    """Return the table of a group, sizes ascending, up to `MAX_NBYTES`.

    Args:
        world_size: one of `WORLD_SIZES`.
        forced: the row that the option forces; None: the table decides.
    """
    return _TABLES[world_size] if forced is None else (dataclasses.replace(forced, up_to_nbytes=MAX_NBYTES),)


def max_vecs(world_size: int) -> int:
    """Return the largest `vecs` of a row: `max_vecs` in csrc/kernels.cuh."""
    return {2: 4, 4: 2}.get(world_size, 1)


def parse(environ: Mapping[str, str] | None = None) -> Row | None:
    """Read `OPTION`; None if it is unset or empty.

    Raises:
        ValueError: it can't be parsed, or no kernel has that shape.
    """
    return read_option(OPTION, os.environ if environ is None else environ, parse_row)


def parse_row(text: str) -> Row:
    """Parse a row's text, "algorithm" or "algorithm:vecs=..,threads=..,blocks=..".

    Raises:
        ValueError: it can't be parsed, or no kernel has that shape.
    """
    row = dataclasses.replace(Row.parse(text), up_to_nbytes=MAX_NBYTES)
    if row.vecs not in (1, 2, 4) or row.threads % 32 or not 32 <= row.threads <= MAX_THREADS:
        raise ValueError(f"{text!r}: vecs is 1, 2 or 4, and threads a multiple of 32 up to {MAX_THREADS}")
    if not 1 <= row.blocks <= MAX_BLOCKS:
        raise ValueError(f"{text!r}: blocks is 1 to {MAX_BLOCKS}")
    return row


# The launch shapes to offer: from bytes, to bytes, vectors per thread, threads and blocks, the most promising first.
_GRIDS = (
    (0, 64 * _KIB, (1,), (256, 512, 128, 64), (264,)),
    (64 * _KIB + 1, _MIB, (1, 2, 4), (512, 256, 128), (32, 48, 132)),
    (_MIB + 1, MAX_NBYTES, (1, 2, 4), (512, 256), (132, 48, 264)),
)
# With more than two ranks, one stage isn't offered where a rank reads more bytes in it; with two, two stages aren't.
_ONE_STAGE_NBYTES = 8 * _MIB


def variants_of(rows: Sequence[Row], world_size: int, nbytes: int) -> list[str]:
    """Return the texts of the rows that can serve a message: the one in use first, then by promise.

    Args:
        rows: the table in use.
        world_size: the number of ranks.
        nbytes: the message's size, in bytes; one above `MAX_NBYTES` has none.
    """
    if nbytes > MAX_NBYTES:
        return []
    algorithms = ["one_stage"] if world_size == 2 or (world_size - 1) * nbytes <= _ONE_STAGE_NBYTES else []
    algorithms += ["two_stage"] if world_size > 2 else []
    found: dict[tuple[object, ...], Row] = {}
    for low, high, *values in _GRIDS:
        for vecs, threads, blocks in itertools.product(*values) if low <= nbytes <= high else ():
            for algorithm in algorithms if vecs <= max_vecs(world_size) else ():
                num_vecs = -(-nbytes // 16 // (world_size if algorithm == "two_stage" else 1))
                grid = max(1, min(blocks, -(-num_vecs // (threads * vecs))))  # rows with the same grid launch the same
                found.setdefault((algorithm, vecs, threads, grid), Row(0, algorithm, vecs, threads, blocks))
    present = next(row for row in rows if nbytes <= row.up_to_nbytes)
    return list(dict.fromkeys(map(str, [present, *found.values()])))


def with_choices(rows: Sequence[Row], world_size: int, choices: Sequence[VariantChoice]) -> tuple[Row, ...]:
    """Return the table with these choices in place of its rows.

    Raises:
        ValueError: a text isn't a row's, or no kernel has its shape; or a choice is for another operation.
    """
    for choice in choices:
        if choice.op != "all_reduce" or parse_row(choice.variant).vecs > max_vecs(world_size):
            raise ValueError(f"{choice}: with {world_size} ranks there is no such kernel")
    return overlay(rows, choices, parse_row)
