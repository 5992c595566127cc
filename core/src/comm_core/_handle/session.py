"""A backend connected to one group on this rank, and every change of its state."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comm_core._control.channel import SessionChannel
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell
from comm_core._plugins.discovery import Plugin

__all__ = ["Session", "close_value"]

_log = logging.getLogger("comm_core")


@dataclasses.dataclass
class Session:
    """What `connect` returned, and what core knows of it. Its methods alone change it.

    Attributes:
        plugin: the backend.
        value: what its `connect` returned, the first argument of every other hook.
        channel: its `context.control`.
        checks_operands: whether its fused hook takes operands that core hasn't validated.
        memory_nbytes: what it took of the group's budget, the most of all ranks.
        tested: the admission cases that it passed or failed.
        wrong: why kinds of message were dropped in its admission, with the group rank that said so, None for all.
        in_use: whether a handle has served by it. Then it is closed with the group and not before: kernels, peers and
            captured graphs may still use its memory.
        captures: the number of its next capture that has something to exchange; see _capture.py.
    """

    plugin: Plugin
    value: Any
    channel: SessionChannel
    checks_operands: bool = False
    memory_nbytes: int = 0
    tested: set[AdmissionCase] = dataclasses.field(default_factory=set)
    wrong: dict[Cell, tuple[str, int | None]] = dataclasses.field(default_factory=dict)
    in_use: bool = False
    captures: int = 0

    @property
    def own_memory_nbytes(self) -> int:
        """What it says that it holds on this rank, in bytes; 0 where the plugin has no `connect`."""
        return int(getattr(self.value, "memory_nbytes", 0)) if self.plugin.has("connect") else 0

    def count_memory(self, every_rank_nbytes: Iterable[int]) -> None:
        """Count the largest of the ranks' memory against the group's budget."""
        self.memory_nbytes = max(every_rank_nbytes)

    def mark_tested(self, cases: Sequence[AdmissionCase]) -> None:
        """Don't test these cases again."""
        self.tested.update(cases)

    def mark_wrong(self, wrong: Mapping[Cell, tuple[str, int | None]]) -> None:
        """Keep why kinds of message failed their admission."""
        self.wrong.update(wrong)

    def require_new_tests(self) -> None:
        """Forget every admission test: its buffers may be others now."""
        self.tested.clear()
        self.wrong.clear()

    def mark_in_use(self) -> None:
        """Keep it open until the group is closed."""
        self.in_use = True

    def use_up_capture(self) -> None:
        """Give the next capture another number."""
        self.captures += 1

    def describe_wrong(self) -> str:
        """The kinds of message that it isn't used for, and why, for people."""
        (cell, (reason, rank)) = next(iter(self.wrong.items()))
        kinds = ", ".join(dict.fromkeys(f"{mode} {dtype}" for _, mode, _, dtype in self.wrong))
        return f"but not for {kinds}: in {cell[0]}{'' if rank is None else f' on rank {rank}'}: {reason}"

    def close(self, *, orderly: bool) -> None:
        """Let the plugin give back what the session holds; what it raises is logged."""
        close_value(self.plugin, self.value, orderly=orderly)

    def release(self) -> None:
        """Close it, unless it is in use."""
        if not self.in_use:
            self.close(orderly=False)


def close_value(plugin: Plugin, value: Any, *, orderly: bool) -> None:
    """Call the plugin's `close` with what its `connect` returned, if it did; what it raises is logged."""
    hook = plugin.hooks.get("close")
    if hook is None or value is None or not plugin.has("connect"):
        return
    try:
        hook(value, orderly)
    except Exception:  # noqa: BLE001 - the plugin boundary: one that can't close must not keep the others open
        _log.exception("comm_core: backend %r raised in close", plugin.name)
