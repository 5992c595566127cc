"""Sessions: backends connected to one group on this rank."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import WaitInterruptedError
from comm_core._control.own_group import OwnGroup
from comm_core._control.worker import run_on_device
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell
from comm_core._plugins.discovery import Plugin
from comm_core._schema import text, tuple_of
from comm_core.tuning import VariantChoice

__all__ = ["Session", "close_all", "close_value"]

_log = logging.getLogger("comm_core")

# The deadline of `abort`, in seconds; it doesn't wait for peers.
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
        suspended: whether its memory is given back: its hook `suspend` has succeeded on every rank, and `resume` hasn't
            since.
        aborted: whether the hook `abort` was called.
        own_group: the session's `context.group`.
        device: the group's device, on which its hooks run.
        timeout_s: the deadline of the hooks `check`, `close`, `variants` and `use_variants`, in seconds.
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
    suspended: bool = False
    aborted: bool = False
    own_group: OwnGroup | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    timeout_s: float = 300.0
    # The results of `padded_session`, by the count's address. The count is kept beside: graphs read it, and no other
    # tensor may get its address meanwhile.
    _padded_values: dict[int, tuple[Any, torch.Tensor]] = dataclasses.field(default_factory=dict)

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

    def padded_value(self, count: torch.Tensor) -> Any:
        """Return the object that takes the place of `value` in calls on batches of `count` real rows.

        NotImplemented if the backend has none. The plugin is asked once for each tensor.
        """
        hook = self.plugin.hooks.get("padded_session")
        if hook is None:
            return NotImplemented
        known = self._padded_values.get(count.data_ptr())
        if known is None:
            known = self._padded_values[count.data_ptr()] = hook(self.value, count), count
        return known[0]

    def needs(self, hook: Literal["suspend", "resume"]) -> bool:
        """Return whether `hook` has to run for this session: the plugin has it, and it hasn't run yet."""
        return self.plugin.has(hook) and self.suspended is (hook == "resume")

    def mark_done(self, hook: Literal["suspend", "resume"]) -> None:
        """Record that `hook` has succeeded on every rank."""
        self.suspended = hook == "suspend"

    def variants(self, op: str, nbytes: int, num_tokens: int) -> tuple[str, ...]:
        """Return the plugin's variants for a message, by its hook; () if it has none."""
        hook = self.plugin.hooks.get("variants")
        if hook is None:
            return ()
        call = functools.partial(hook, self.value, op, nbytes, num_tokens)
        name = f"variants of {self.plugin.name}"
        found: tuple[str, ...] = tuple_of(text)(run_on_device(call, self.device, self.timeout_s, name), name)
        return found

    def use_variants(self, choices: Sequence[VariantChoice]) -> None:
        """Let the plugin serve by these choices, by its hook."""
        call = functools.partial(self.plugin.hooks["use_variants"], self.value, tuple(choices))
        run_on_device(call, self.device, self.timeout_s, f"use_variants of {self.plugin.name}")

    def describe_failed_cells(self) -> str:
        """Describe the kinds of message that this session doesn't serve, and why."""
        (cell, (reason, rank)) = next(iter(self.failed_cells.items()))
        kinds = ", ".join(dict.fromkeys(f"{mode} {dtype}" for _, mode, _, dtype in self.failed_cells))
        where = "" if rank is None else f" on rank {rank}"
        return f"available, except for {kinds}: the admission test of {cell[0]} failed{where}: {reason}"

    def close(self, *, orderly: bool, timeout_s: float | None = None) -> None:
        """Close the session by the plugin's hook, under a deadline, by default the session's; log any failure.

        Raises:
            KeyboardInterrupt: it interrupted the wait, or the hook raised it.
        """
        self._padded_values.clear()
        try:
            if self.plugin.has("close") and self.plugin.has("connect"):
                self._close_value(orderly=orderly, timeout_s=self.timeout_s if timeout_s is None else timeout_s)
        finally:
            if self.own_group is not None:
                self.own_group.close(tell_peers=False)

    def _close_value(self, *, orderly: bool, timeout_s: float) -> None:
        call = functools.partial(close_value, self.plugin, self.value, orderly=orderly)
        try:
            run_on_device(call, self.device, timeout_s, f"close of {self.plugin.name}")
        except TimeoutError as error:
            _log.warning("comm_core: %s; what it frees stays in use", error)
        except RuntimeError:  # no thread can be started, as at the interpreter's end
            call()

    def abort_own_group(self) -> None:
        """End all calls in the session's `context.group`: the plugin's `close` may wait for their threads."""
        if self.own_group is not None:
            self.own_group.close(tell_peers=True)

    def abort(self) -> None:
        """Let the peers' waits for this rank end, by the plugin's hook `abort`; log any exception. Idempotent."""
        hook = self.plugin.hooks.get("abort")
        if hook is None or self.aborted or self.suspended:  # no rank waits for a call of a suspended group
            return
        self.aborted = True
        call = functools.partial(hook, self.value)
        try:
            run_on_device(call, self.device, _ABORT_S, f"abort of {self.plugin.name}")
        except Exception:  # noqa: BLE001 - the plugin boundary: the call's own error is raised all the same
            _log.exception("comm_core: backend %r raised in abort", self.plugin.name)


def close_all(sessions: Iterable[Session], *, orderly: bool = False, timeout_s: float | None = None) -> None:
    """Close sessions one after the other, all of them even if one is interrupted.

    Args:
        sessions: the sessions.
        orderly: see the hook `close`.
        timeout_s: the deadline of all together, in seconds; None: each has its own.

    Raises:
        KeyboardInterrupt: a session's `close` was interrupted; after all are closed.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    interrupt: BaseException | None = None
    for session in sessions:
        try:
            session.close(orderly=orderly, timeout_s=None if end is None else max(end - time.monotonic(), 0.0))
        except (KeyboardInterrupt, WaitInterruptedError) as error:  # noqa: PERF203 - the others must be closed all the same
            interrupt = error
    if interrupt is not None:
        raise interrupt


def close_value(plugin: Plugin, value: Any, *, orderly: bool) -> None:
    """Call the plugin's `close` with the object that its `connect` returned, if any; log any exception."""
    hook = plugin.hooks.get("close")
    if hook is None or value is None or not plugin.has("connect"):
        return
    try:
        hook(value, orderly)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - plugin boundary: the other sessions must be closed all the same
        _log.exception("comm_core: backend %r raised in close", plugin.name)
