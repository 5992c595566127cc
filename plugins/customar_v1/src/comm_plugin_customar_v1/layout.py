"""How a rank's buffer is divided; csrc/params.cuh says what each region is for."""

from __future__ import annotations

import dataclasses

from comm_plugin_customar_v1.policy import MAX_NBYTES

__all__ = ["Layout", "plan"]

#: Regions begin at multiples of it, in bytes.
_ALIGN = 4096
#: A buffer is a multiple of it, in bytes: a page of the driver's, which a peer that opens any of it has mapped whole.
_PAGE = 2 << 20
_PHASES = 2
_LEAST_NBYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Layout:
    """Offsets and sizes in a rank's buffer, in bytes.

    Attributes:
        nbytes: of the whole buffer.
        letters_at: where the letters begin.
        staging_at, staging_nbytes: where the staging begins, and the size of one phase; larger messages go in several
            launches.
    """

    nbytes: int
    letters_at: int
    staging_at: int
    staging_nbytes: int

    def numbers(self) -> list[int]:
        """As `Session` in csrc/session.cuh takes them."""
        return list(dataclasses.astuple(self))


def plan(budget_nbytes: int, flags_nbytes: int, letters_nbytes: int) -> Layout:
    """Lay out a buffer whose staging takes the largest message, or as much as the budget allows.

    Args:
        budget_nbytes: the most that the buffer may take.
        flags_nbytes: of the counter and the barriers' flags; the native code's `constants()`.
        letters_nbytes: likewise.

    Raises:
        MemoryError: the budget doesn't hold even a staging of 64 KiB.
    """
    letters_at = _up(flags_nbytes, _ALIGN)
    staging_at = _up(letters_at + letters_nbytes, _ALIGN)
    staging = MAX_NBYTES
    while True:
        nbytes = _up(staging_at + _PHASES * staging, _PAGE)
        if nbytes <= budget_nbytes:
            return Layout(nbytes, letters_at, staging_at, staging)
        staging //= 2
        if staging < _LEAST_NBYTES:
            raise MemoryError(f"a buffer of {nbytes} bytes is needed, and the budget is {budget_nbytes}")


def _up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple
