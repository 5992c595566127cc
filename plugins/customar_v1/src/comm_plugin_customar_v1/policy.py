"""Which algorithm, in which shape of launch, serves which size: the table, and the option that overrides it.

Pure: what it returns depends on its arguments alone, so that every rank has the same table.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

__all__ = ["ALGORITHMS", "MAX_NBYTES", "OPTION", "WORLD_SIZES", "Row", "flat", "most_vecs", "parse", "rows_for"]

#: `Algorithm` in csrc/params.cuh.
ALGORITHMS = {"one_stage": 0, "two_stage": 1}
#: The variable that forces one algorithm and, after a colon, its shape: "two_stage:vecs=2,threads=256,blocks=264".
OPTION = "COMM_CORE_CUSTOMAR_V1_ALGORITHM"
#: The ranks that there are kernels for: world*.cu in csrc.
WORLD_SIZES = (2, 4, 6, 8)
_KIB, _MIB = 1 << 10, 1 << 20
#: The largest message, in bytes.
MAX_NBYTES = 8 * _MIB
#: `kMaxThreads` and `kMaxBlocks` in csrc/params.cuh.
MAX_THREADS, MAX_BLOCKS = 512, 512
_SHAPE = ("vecs", "threads", "blocks")


@dataclasses.dataclass(frozen=True)
class Row:
    """How messages up to a size are served.

    Attributes:
        up_to_nbytes: the largest message, in bytes.
        algorithm: one of `ALGORITHMS`.
        vecs: vectors of 16 bytes of each rank that a thread has in flight; see `most_vecs`.
        threads: of a block, a multiple of 32, `MAX_THREADS` at most.
        blocks: the most of a grid, which is otherwise as large as the message needs, and the device can hold at once.
    """

    up_to_nbytes: int
    algorithm: str
    vecs: int = 1
    threads: int = 256
    blocks: int = 264

    def numbers(self) -> tuple[int, ...]:
        """As `Shape` in csrc/session.cuh has them."""
        return (self.up_to_nbytes, ALGORITHMS[self.algorithm], self.vecs, self.threads, self.blocks)


# Two and four ranks: the fastest shapes, or within 2 % of them, of benchmarks/2026-11-22-h200x2-customar_v1_tune.json,
# 2026-11-22-h200x4-customar_v1_tune.json and, below 512 KiB, 2026-11-22-h200x4-customar_v1_tune_small.json (H200,
# graphs of dependent calls, bfloat16). Each block meets its peers', and that costs more than bytes do: at two ranks
# 256 KiB takes 4.3 us in 32 blocks, 5.5 us in 128.
#
# More ranks: unmeasured; four's shapes, and one stage ends where vLLM's and SGLang's kernels of this design end it, at
# 256 KiB.
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


def rows_for(world_size: int, forced: Row | None = None) -> tuple[Row, ...]:
    """The table of a group, sizes ascending, up to `MAX_NBYTES`.

    Args:
        world_size: ranks in the group, one of `WORLD_SIZES`.
        forced: what `parse` read; None: the table decides.
    """
    return _TABLES[world_size] if forced is None else (dataclasses.replace(forced, up_to_nbytes=MAX_NBYTES),)


def most_vecs(world_size: int) -> int:
    """Of a row; `max_vecs` in csrc/kernels.cuh."""
    return {2: 4, 4: 2}.get(world_size, 1)


def parse(environ: Mapping[str, str] | None = None) -> Row | None:
    """What `OPTION` says; None where it is unset or empty.

    Raises:
        ValueError: it can't be read.
    """
    text = (os.environ if environ is None else environ).get(OPTION, "").strip()
    if not text:
        return None
    algorithm, _, rest = text.partition(":")
    pairs = [item.partition("=") for item in rest.split(",") if item]
    if algorithm not in ALGORITHMS or not all(name in _SHAPE and number.isdecimal() for name, _, number in pairs):
        known = ", ".join(f"{name}=" for name in _SHAPE)
        raise ValueError(f"{OPTION}={text!r} isn't {' or '.join(ALGORITHMS)}, with numbers for {known} after a colon")
    row = Row(MAX_NBYTES, algorithm, **{name: int(number) for name, _, number in pairs})
    if row.vecs not in (1, 2, 4) or row.threads % 32 or not 32 <= row.threads <= MAX_THREADS:
        raise ValueError(f"{OPTION}={text!r}: vecs are 1, 2 or 4, and threads a multiple of 32 up to {MAX_THREADS}")
    if not 1 <= row.blocks <= MAX_BLOCKS:
        raise ValueError(f"{OPTION}={text!r}: blocks are 1 to {MAX_BLOCKS}")
    return row


def flat(rows: Sequence[Row]) -> list[int]:
    """The rows' numbers, one after the other, as the native code takes them."""
    return [number for row in rows for number in row.numbers()]
