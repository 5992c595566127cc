"""Closes a group's handle, together with its peers where they can still be reached."""

from __future__ import annotations

import contextlib
import logging

import torch

from comm_core._control.stage import Stage
from comm_core._group.handles import GroupState, is_alive, remove
from comm_core.errors import CommError

__all__ = ["close_group"]

_log = logging.getLogger("comm_core")


def close_group(state: GroupState) -> None:
    """Close the handle and give back what its sessions hold. Collective; warns where a peer doesn't come."""
    remove(state)
    serving, control, group = state.serving, state.control, state.group
    if serving is None:
        return
    failure = serving.failure
    serving.retire(f"{state.title}: its handle was closed")
    state.serving = state.backend = None
    if control is None or group is None:
        return
    if not is_alive(group):
        state.close_without_peers()
        return
    orderly = False
    try:
        with Stage(control, "close") as stage:
            if failure is not None:
                # Whom a call has waited for in vain isn't waited for again, nor do the others wait for that.
                raise stage.abort(failure)
            if "cuda" in serving.topology.device_types:
                torch.cuda.synchronize(serving.device)
            stage.barrier()
        orderly = True
    except Exception as error:  # noqa: BLE001 - what this rank holds is given back whatever became of the others
        _log.warning("%s is closed without all its ranks: %s", state.title, error)
    finally:
        for session in state.sessions:
            session.close(orderly=orderly)
    if orderly:
        # Memory that this rank's graphs read may be freed once it returns: by then no peer has it mapped.
        with contextlib.suppress(CommError), Stage(control, "closed") as stage:
            stage.barrier()
    control.finish()
