"""How a rank's buffer is divided into regions; csrc/params.cuh describes each. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from comm_plugin_customar_v2.policy import WIRE_ALGORITHMS, Row

__all__ = ["Layout", "plan"]

# Regions begin at multiples of it, in bytes.
_ALIGN = 4096
# A buffer's size is a multiple of it, in bytes: the granularity of the driver's virtual memory.
_PAGE = 2 << 20
#: The largest slot, in bytes. A larger message takes several launches, and going from one to the next costs some 2 µs
#: of a launch's 90.
SLOT_NBYTES = 32 << 20
# The size of the launch counter at the beginning of a buffer, in bytes.
_COUNTER_NBYTES = 8
# The size of a tail's slot, in bytes: one vector; and how many there are for each phase and peer: `kTailLengths` for
# each dtype.
_TAIL_NBYTES = 16
_TAILS = 3 * 8
# What each half of a slot has in addition, so that each kind of call has cells of its own: `kKinds` in csrc/params.cuh.
_KINDS_NBYTES = 5 * 4096
_PHASES = 2
_MIN_SLOT_NBYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Layout:
    """Offsets and sizes in a rank's buffer, in bytes.

    Attributes:
        tails_at: where the tails' slots begin.
        cells_at, cells_nbytes: where the cells' slots begin, and the size of one slot. Larger messages take several
            launches.
        nbytes: the size of the whole buffer.
    """

    tails_at: int
    cells_at: int
    cells_nbytes: int
    nbytes: int

    def numbers(self) -> list[int]:
        """Return the fields as `Session` in csrc/session.cuh takes them."""
        return list(dataclasses.astuple(self))[:-1]


def plan(world_size: int, rows: Iterable[Row], budget_nbytes: int) -> Layout:
    """Lay out a buffer with slots for the largest message of any row, or for as much as fits the budget.

    Args:
        world_size: the number of ranks.
        rows: all rows that the session may use.
        budget_nbytes: the largest size of the buffer.

    Raises:
        MemoryError: not even slots of 64 KiB fit the budget.
    """
    cells = max(_slot_nbytes(row, world_size) for row in rows)
    while True:
        layout = _layout(_up(cells) + 2 * _KINDS_NBYTES, world_size - 1)
        if layout.nbytes <= budget_nbytes:
            return layout
        cells //= 2
        if cells < _MIN_SLOT_NBYTES:
            raise MemoryError(
                f"a buffer of at least {layout.nbytes} bytes is needed for {world_size} ranks, and the budget is "
                f"{budget_nbytes} (COMM_CORE_MEMORY_BUDGET_NBYTES)"
            )


def _slot_nbytes(row: Row, world_size: int) -> int:
    """Return the size of a peer's slot that takes the largest message of a row in one launch."""
    # A half for the shares of a part and a half for its sums.
    part = -(-row.up_to_nbytes // world_size)
    if row.algorithm in WIRE_ALGORITHMS:
        # A chunk of 256 bytes travels as 128 and a scale of 4. With room for rounding up to a chunk, and for rounding
        # down in `scales_at` in csrc/packets.cuh; of two ranks' halves, both together hold a message of one shot.
        return 2 * ((part // 256 + 1) * 132 + 33 * 16)
    # With room for rounding up to a vector.
    return min(SLOT_NBYTES, 2 * (part + 32) if row.algorithm == "twoshot_push" else row.up_to_nbytes)


def _up(nbytes: int, unit: int = _ALIGN) -> int:
    return -(-nbytes // unit) * unit


def _layout(cells: int, peers: int) -> Layout:
    tails_at = _up(_COUNTER_NBYTES)
    cells_at = _up(tails_at + _TAILS * _PHASES * peers * _TAIL_NBYTES)
    return Layout(tails_at, cells_at, cells, _up(cells_at + _PHASES * peers * cells, _PAGE))
