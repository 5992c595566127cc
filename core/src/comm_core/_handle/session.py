"""Sessions: backends connected to one group on this rank."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import run_with_deadline
from comm_core._control.own_group import OwnGroup
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell
from comm_core._plugins.discovery import Plugin

__all__ = ["Session", "close_value"]

_log = logging.getLogger("comm_core")

# The deadline of `abort`, in seconds; it waits for nobody.
_ABORT_S = 10.0


@dataclasses.dataclass
class Session:
    """The object that `connect` returned, with core's state about it. Only its methods change that state.

    Attributes:
        plugin: the backend's plugin.
        value: the object that `connect` returned, the first argument of every later hook.
        channel: the session's `context.control`.
        checks_operands: whether the fused hook accepts operands that core hasn't validated.
        memory_nbytes: the session's share of the group's memory budget in bytes, the largest of all ranks.
        tested: the admission cases that the session has passed or failed.
        failed_cells: the kinds of message that failed the admission test, each with the reason and the group rank that
            gave it, None for all ranks.
        in_use: whether a handle has served calls by this session. Such a session stays open until the group is closed:
            kernels, peers and captured graphs may still use its memory.
        capture_number: the number of the session's next capture with something to exchange; see `_group/capture.py`.
        own_group: the session's `context.group`.
    """

    plugin: Plugin
    value: Any
    channel: SessionChannel
    checks_operands: bool = False
    memory_nbytes: int = 0
    tested: set[AdmissionCase] = dataclasses.field(default_factory=set)
    failed_cells: dict[Cell, tuple[str, int | None]] = dataclasses.field(default_factory=dict)
    in_use: bool = False
    capture_number: int = 0
    own_group: OwnGroup | None = None

    @property
    def reported_memory_nbytes(self) -> int:
        """The memory in bytes that the session reports for this rank; 0 if the plugin has no `connect`."""
        return int(getattr(self.value, "memory_nbytes", 0)) if self.plugin.has("connect") else 0

    def count_memory(self, every_rank_nbytes: Iterable[int]) -> None:
        """Charge the largest memory of any rank to the group's budget."""
        self.memory_nbytes = max(every_rank_nbytes)

    def mark_tested(self, cases: Sequence[AdmissionCase]) -> None:
        """Record that these admission cases have run."""
        self.tested.update(cases)

    def mark_failed(self, cells: Mapping[Cell, tuple[str, int | None]]) -> None:
        """Record the kinds of message that failed the admission test, with the reasons."""
        self.failed_cells.update(cells)

    def reset_admission(self) -> None:
        """Require every admission test again, because the session's buffers may have changed."""
        self.tested.clear()
        self.failed_cells.clear()

    def mark_in_use(self) -> None:
        """Keep the session open until the group is closed."""
        self.in_use = True

    def advance_capture(self) -> None:
        """Advance the number of the next capture."""
        self.capture_number += 1

    def describe_failed_cells(self) -> str:
        """Return the text that reports the kinds of message without this session, and the reason."""
        (cell, (reason, rank)) = next(iter(self.failed_cells.items()))
        kinds = ", ".join(dict.fromkeys(f"{mode} {dtype}" for _, mode, _, dtype in self.failed_cells))
        where = "" if rank is None else f" on rank {rank}"
        return f"available, except for {kinds}: the admission test of {cell[0]} failed{where}: {reason}"

    def close(self, *, orderly: bool) -> None:
        """Close the session by the plugin's hook, and free its own group; log any exception."""
        close_value(self.plugin, self.value, orderly=orderly)
        if self.own_group is not None:
            self.own_group.close(tell_peers=False)

    def abort(self) -> None:
        """Let the peers' waits for this rank end, by the plugin's hook `abort`; log any exception."""
        hook = self.plugin.hooks.get("abort")
        if hook is None:
            return
        try:
            run_with_deadline(functools.partial(hook, self.value), _ABORT_S, name=f"abort of {self.plugin.name}")
        except Exception:  # noqa: BLE001 - the plugin boundary: the call's own error is raised all the same
            _log.exception("comm_core: backend %r raised in abort", self.plugin.name)

    def release(self) -> None:
        """Close the session after a failure, unless it is in use."""
        if self.in_use:
            return
        if self.own_group is not None:
            # First: calls that wait in the group raise, and the plugin's `close` may wait for their threads.
            self.own_group.close(tell_peers=True)
        self.close(orderly=False)


def close_value(plugin: Plugin, value: Any, *, orderly: bool) -> None:
    """Call the plugin's `close` with the object that its `connect` returned, if any; log any exception."""
    hook = plugin.hooks.get("close")
    if hook is None or value is None or not plugin.has("connect"):
        return
    try:
        hook(value, orderly)
    except Exception:  # noqa: BLE001 - the plugin boundary: the other sessions must be closed all the same
        _log.exception("comm_core: backend %r raised in close", plugin.name)
