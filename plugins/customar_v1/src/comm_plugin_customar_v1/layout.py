"""How a rank's buffer is divided into regions; csrc/params.cuh describes each. Pure."""

from __future__ import annotations

import dataclasses

from comm_plugin_customar_v1.policy import MAX_NBYTES

__all__ = ["Layout", "plan"]

# Regions begin at multiples of it, in bytes.
_ALIGN = 4096
# A buffer's size is a multiple of it, in bytes: the granularity of the driver's virtual memory.
_PAGE = 2 << 20
_PHASES = 2
_MIN_STAGING_NBYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Layout:
    """Offsets and sizes in a rank's buffer, in bytes.

    Attributes:
        test_at: where the pages of the peer-access test begin.
        staging_at, staging_nbytes: where the staging begins, and the size of one of its phases. Larger messages take
            several launches.
        nbytes: the size of the whole buffer.
    """

    test_at: int
    staging_at: int
    staging_nbytes: int
    nbytes: int

    def numbers(self) -> list[int]:
        """Return the fields as `Session` in csrc/session.cuh takes them."""
        return list(dataclasses.astuple(self))[:-1]


def plan(budget_nbytes: int, flags_nbytes: int, test_nbytes: int) -> Layout:
    """Lay out a buffer with staging for the largest message, or for as much as fits the budget.

    Args:
        budget_nbytes: the largest size of the buffer.
        flags_nbytes: the size of the counter and the barriers' flags, from the native code's `constants()`.
        test_nbytes: the size of the pages of the peer-access test, likewise.

    Raises:
        MemoryError: not even staging of 64 KiB fits the budget.
    """
    test_at = _up(flags_nbytes, _ALIGN)
    staging_at = _up(test_at + test_nbytes, _ALIGN)
    staging = MAX_NBYTES
    while True:
        nbytes = _up(staging_at + _PHASES * staging, _PAGE)
        if nbytes <= budget_nbytes:
            return Layout(test_at, staging_at, staging, nbytes)
        staging //= 2
        if staging < _MIN_STAGING_NBYTES:
            raise MemoryError(
                f"a buffer of at least {nbytes} bytes is needed, and the budget is {budget_nbytes} "
                "(COMM_CORE_MEMORY_BUDGET_NBYTES)"
            )


def _up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple
