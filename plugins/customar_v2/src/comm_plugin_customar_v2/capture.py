"""How calls are recorded inside a capture: with a row of the table of inputs, where the policy's table has a pull."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from comm_plugin_customar_v2 import policy

__all__ = ["Recorder"]


class Recorder:
    """Stands for a session's launches while `capture_ctx` is entered.

    What a call gets depends on its size and on how many were recorded, which is alike on all ranks, and on nothing
    that may be this rank's alone, such as whether it is in place.
    """

    def __init__(
        self,
        into: Callable[[Any, Any, int], None],
        fresh: Callable[[Any, int], Any],
        take: Callable[[int, int], int],
        rows: Sequence[policy.Row],
    ) -> None:
        """Args: the session's own launches, what gives a row of the table (0: none), and the policy's table."""
        self._into = into
        self._fresh = fresh
        self._take = take
        self._rows = rows

    def into(self, tensor: torch.Tensor, out: torch.Tensor, _: int) -> None:
        """As the session's; the hook gives no row."""
        row, algorithm = self._row(tensor)
        if row and algorithm == "oneshot_pull" and out is tensor:
            # Peers read this rank's input until the launch's end: csrc/pull.cuh.
            out.copy_(self._fresh(tensor, row))
        else:
            self._into(tensor, out, row)

    def fresh(self, tensor: torch.Tensor, _: int) -> Any:
        """As the session's; the hook gives no row."""
        return self._fresh(tensor, self._row(tensor)[0])

    def _row(self, tensor: torch.Tensor) -> tuple[int, str]:
        """The tag of the call's row and what it is served by; 0 and "" outside a stream's capture, as in warm-ups."""
        if not torch.cuda.is_current_stream_capturing():
            return 0, ""
        nbytes = tensor.nbytes
        served = next((row for row in self._rows if nbytes <= row.up_to_nbytes), None)
        if served is None or not served.pulls:
            return 0, ""
        return self._take(tensor.data_ptr(), nbytes), served.algorithm
