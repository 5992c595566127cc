"""A candidate's own process group: no call of a backend that fails is paired with the terminal fallback's calls."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from comm_core._control.deadline import describe, raises_interrupts, run_with_deadline
from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import Stage
from comm_core._control.store import Control, can_clone, store_of
from comm_core._control.unlisted_group import backends_in, forget_group, make_group
from comm_core.errors import CommError, CommTimeoutError

__all__ = ["OwnGroup"]

_log = logging.getLogger("comm_core")
# The longest wait for the abort of a group, in seconds: NCCL's may hang, and the caller has other groups to free.
_ABORT_S = 10.0
# NCCL ends the process when one of its calls times out. So its timeout is this much longer than the deadlines by which
# core aborts a candidate's group, in seconds.
_NCCL_GRACE_S = 60.0
# The tags of the receive calls that end a Gloo group count down from here, the largest tag: no plugin's message has it.
_LAST_TAG = 2**31 - 1


class OwnGroup:
    """The process group of one candidate, with the ranks of the user's group; made when it is first asked for.

    Args:
        parent: the user's group.
        control: its control channel.
        name: equal on every rank, and used once per incarnation.
        timeout_s: how long the other ranks may take to ask for it too, and Gloo's timeout, in seconds.
    """

    def __init__(self, parent: dist.ProcessGroup, control: Control, name: str, timeout_s: float) -> None:
        self._parent = parent
        self._control = control
        self._name = name
        self._timeout_s = timeout_s
        self._making = threading.Lock()  # held while a thread makes the group
        self._lock = threading.Lock()  # guards the attributes below; never held during a wait
        self._group: dist.ProcessGroup | None = None
        self._stage: Stage | None = None  # in which the ranks meet before they make the group
        self._failure = ""  # the reason why there is no group any more

    @raises_interrupts
    def get(self) -> dist.ProcessGroup:
        """Return the group. Collective at the first call: every rank asks at the same point of its program.

        Raises:
            CaptureError: it doesn't exist yet, and the current stream captures.
            CommTimeoutError: a rank didn't ask in time.
            CommError: another rank failed, the group can't be made, or it is closed.
        """
        group = self._group
        if group is not None:
            return group
        raise_if_capturing(
            "context.group doesn't exist yet, and the ranks can't make it",
            "Read it in connect, or reduce a tensor before the capture",
        )
        with self._making:
            with self._lock:
                if self._group is not None:
                    return self._group
                if self._failure:
                    raise self._no_group()
                self._stage = Stage(self._control, self._name, self._timeout_s)
            group = self._meet_and_make(self._stage)
            if not self._keep(group):
                _abort(group, self._name)
                raise self._no_group()
            return group

    def close(self, *, tell_peers: bool) -> None:
        """Abort and free the group without waiting for other ranks; threads that wait in it raise. Idempotent.

        Args:
            tell_peers: whether ranks that have asked for the group, and wait for this one, must learn that it failed.
        """
        was_open = not self._failure
        self._fail("its session is closed")
        with self._lock:
            group, self._group, stage = self._group, None, self._stage
        if group is not None:
            _abort(group, self._name)
        elif tell_peers and was_open:
            (stage or Stage(self._control, self._name)).abort("its backend failed before it asked for the group")

    def _meet_and_make(self, stage: Stage) -> dist.ProcessGroup:
        try:
            stage.barrier()
            return _make(self._parent, f"{self._control.prefix}/{self._name}", self._timeout_s)
        except Exception as error:
            self._fail(describe(error))
            # Not as a `StageAbortedError`: only the stage of the hook that asks says what all ranks raise.
            if isinstance(error, CommTimeoutError):
                raise CommTimeoutError(str(error), error.ranks) from error
            if isinstance(error, CommError):
                raise CommError(str(error)) from error
            raise CommError(f"{self._name}: the process group can't be made: {describe(error)}") from error

    def _keep(self, group: dist.ProcessGroup) -> bool:
        """Keep the group that was made, unless this rank has closed it meanwhile."""
        with self._lock:
            if not self._failure:
                self._group = group
            return not self._failure

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = self._failure or reason

    def _no_group(self) -> CommError:
        return CommError(f"{self._name}: there is no such group any more: {self._failure}")


def _make(parent: dist.ProcessGroup, name: str, timeout_s: float) -> dist.ProcessGroup:
    """Create a group with the ranks and the kinds of backends of `parent`. Collective."""
    store = store_of(parent)
    shared = not can_clone(store)
    if not shared:
        store = store.clone()  # a blocked read holds the client's lock
    timeout = timedelta(seconds=timeout_s)
    if "nccl" in str(dist.get_backend_config(parent)) and not shared:
        store.set_timeout(timeout)  # for the exchange of NCCL's identifier
    group = make_group(
        dist.get_process_group_ranks(parent),
        dist.get_rank(parent),
        dist.get_backend(parent),
        store,
        name,
        timeout=timeout,
        desc="comm_core: a backend's own group",
    )
    for backend in backends_in(group):
        if dist.is_nccl_available() and isinstance(backend, dist.ProcessGroupNCCL):
            backend._set_default_timeout(timeout + timedelta(seconds=_NCCL_GRACE_S))  # noqa: SLF001
    return group


def _abort(group: dist.ProcessGroup, title: str) -> None:
    """Remove a group from torch's registries, and end its connections and the calls that wait in it."""
    forget_group(group, group.group_name)
    for backend in backends_in(group):
        end = functools.partial(_end_gloo, backend) if isinstance(backend, dist.ProcessGroupGloo) else backend.abort
        try:
            run_with_deadline(end, _ABORT_S, name=f"abort of {title}")
        except TimeoutError as error:
            hint = "NCCL waits until no captured graph has calls of the group: free graphs before comm.close"
            _log.warning("comm_core: the process group %s isn't aborted yet: %s. %s", title, error, hint)
        except RuntimeError as error:
            _log.warning("comm_core: can't abort the process group %s: %s", title, describe(error))


def _end_gloo(backend: Any) -> None:
    """Close the connections of a Gloo group: calls that wait in it, here and on the other ranks, raise at once.

    Gloo's `abort` leaves them as they are. But the first call that times out closes all connections of its context. A
    group has one context for each network device.
    """
    peer = (backend.rank() + 1) % backend.size()
    for number in range(len(backend.options._devices)):  # noqa: SLF001
        with contextlib.suppress(RuntimeError):  # the time-out itself, or the connections are closed already
            backend.recv([torch.empty(1)], peer, _LAST_TAG - number).wait(timedelta(milliseconds=1))
