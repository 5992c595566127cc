"""How a rank's buffer is divided; csrc/params.cuh says what each region is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from comm_plugin_customar_v2.policy import Row

__all__ = ["Layout", "plan"]

#: Regions begin at multiples of it, in bytes: a page of device memory's second-level cache line and more.
_ALIGN = 4096
#: The largest slot, in bytes. Larger messages go in several launches, whose hand-over costs some 2 µs of 90.
SLOT_NBYTES = 32 << 20
#: Of the launch counter, with which a buffer begins, in bytes.
_COUNTER_NBYTES = 8
#: A tail's slot, in bytes: one vector.
_TAIL_NBYTES = 16
_PHASES = 2
_LEAST_NBYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Layout:
    """Offsets and sizes in a rank's buffer, in bytes.

    Attributes:
        tails_at: where the region begins.
        cells_at, cells_nbytes: where the region begins, and the size of one slot.
        nbytes: of the whole buffer.
    """

    tails_at: int
    cells_at: int
    cells_nbytes: int
    nbytes: int

    def numbers(self) -> list[int]:
        """As `Session` in csrc/session.cuh takes them."""
        return list(dataclasses.astuple(self))[:-1]


def plan(world_size: int, rows: Iterable[Row], budget_nbytes: int) -> Layout:
    """Lay out a buffer for what the rows' algorithms need.

    Args:
        world_size: ranks in the group.
        rows: the table, or all that the session may use.
        budget_nbytes: the most that the buffer may take.

    Raises:
        MemoryError: the budget doesn't hold even slots of 64 KiB.
    """
    cells = min(SLOT_NBYTES, max(_slot_nbytes(row, world_size) for row in rows))
    while True:
        layout = _layout(_up(cells), world_size - 1)
        if layout.nbytes <= budget_nbytes:
            return layout
        cells //= 2
        if cells < _LEAST_NBYTES:
            raise MemoryError(
                f"{layout.nbytes} bytes of buffers are needed for {world_size} ranks, and the budget is {budget_nbytes}"
            )


def _slot_nbytes(row: Row, world_size: int) -> int:
    """Bytes of a peer's slot for the largest message of a row in one launch."""
    if row.algorithm == "twoshot_push":
        # Two halves of a part each, rounded up to a vector; small messages go one-shot.
        part = -(-row.up_to_nbytes // world_size)
        return 2 * (part + 32)
    return row.up_to_nbytes


def _up(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _layout(cells: int, peers: int) -> Layout:
    tails_at = _up(_COUNTER_NBYTES)
    cells_at = _up(tails_at + _PHASES * peers * _TAIL_NBYTES)
    return Layout(tails_at, cells_at, cells, _up(cells_at + _PHASES * peers * cells))
