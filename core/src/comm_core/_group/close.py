"""Close a group's handle, together with the peers if they can still be reached."""

from __future__ import annotations

import contextlib
import logging

import torch
import torch.distributed as dist

from comm_core._control.stage import Stage
from comm_core._control.store import Control
from comm_core._group.states import GroupState, all_states, is_alive, remove
from comm_core._handle.serving import Serving
from comm_core._handle.session import close_all
from comm_core.errors import CommError

__all__ = ["abort_handle", "close_group"]

_log = logging.getLogger("comm_core")


def close_group(state: GroupState) -> None:
    """Close the handle and its sessions. Collective; logs a warning if a peer doesn't arrive in time.

    Raises:
        KeyboardInterrupt: it came meanwhile, or a plugin raised it; after everything is closed.
    """
    remove(state)
    serving, control, group = state.serving, state.control, state.group
    if serving is None:
        return
    state.announce_end()
    failure = serving.failure
    serving.retire(f"{state.title}: its handle was closed")
    state.serving = state.backend = None
    if control is None or group is None:
        return
    if not is_alive(group):
        state.close_without_peers()
        return
    try:
        orderly = _meet(state, control, serving, failure)
    except BaseException:  # an interrupt
        _close_sessions(state, control, orderly=False)
        raise
    _close_sessions(state, control, orderly=orderly)


def abort_handle(group: dist.ProcessGroup) -> None:
    """Close the handle of a group, if it has one, without waiting for the peers. Local.

    The peers' calls that wait for this rank raise, and so do their later ones.
    """
    for state in all_states():
        if state.group is group:
            _abort(state)


def _abort(state: GroupState) -> None:
    # First of all: a thread that waits for a peer, perhaps with the lock held, raises then.
    serving, control = state.serving, state.control
    if serving is not None:
        serving.fail(f"{state.title}: its handle was aborted")
    with state.lock:
        remove(state)
        state.announce_end()
        state.serving = state.backend = None
        if serving is not None and control is not None:
            _close_sessions(state, control, orderly=False)


def _meet(state: GroupState, control: Control, serving: Serving, failure: str | None) -> bool:
    """Wait until every rank has finished its work; log a warning and return False if one hasn't in time."""
    try:
        with Stage(control, "close") as stage:
            if failure is not None:
                # A call has already timed out on a peer: no rank waits for that peer again.
                raise stage.abort(failure)
            if "cuda" in serving.topology.device_types:
                torch.cuda.synchronize(serving.device)
            stage.barrier()
    except Exception as error:  # noqa: BLE001 - this rank frees its resources even if others fail
        _log.warning("%s is closed without waiting for all its ranks: %s", state.title, error)
        return False
    return True


def _close_sessions(state: GroupState, control: Control, *, orderly: bool) -> None:
    """Close the sessions and leave the control channel.

    Raises:
        KeyboardInterrupt: it came meanwhile, or a plugin raised it; after everything is closed.
    """
    try:
        close_all(state.sessions, orderly=orderly)
    finally:
        try:
            if orderly:
                # The caller may free memory that its graphs read once this returns, so every peer must have unmapped
                # it.
                with contextlib.suppress(CommError), Stage(control, "closed") as stage:
                    stage.barrier()
        finally:
            control.finish()
