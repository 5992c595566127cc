"""A candidate's own process group: no call of a backend that fails is ever paired with the terminal fallback's calls.

`dist.new_group` can't make it: either all ranks of the job must call, or the name differs between ranks that are in
unequal numbers of groups. So this module alone uses torch's private functions for the creation and the registration of
process groups. Tests pin them on every supported torch release.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from comm_core._control.deadline import describe, run_with_deadline
from comm_core._control.guard import raise_if_capturing
from comm_core._control.stage import Stage
from comm_core._control.store import Control, can_clone, store_of
from comm_core.errors import CommError, CommTimeoutError

__all__ = ["OwnGroup"]

_log = logging.getLogger("comm_core")
# torch declares none of the private names.
_c10d: Any = distributed_c10d

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


class _Names(dict[Any, str]):
    """torch's names of process groups, in which `[group]` also finds a group that isn't counted."""

    def __missing__(self, group: Any) -> str:
        return str(group.group_name)


def _make(parent: dist.ProcessGroup, name: str, timeout_s: float) -> dist.ProcessGroup:
    """Create a group with the ranks and the kinds of backends of `parent`. Collective."""
    ranks = dist.get_process_group_ranks(parent)
    store = store_of(parent)
    shared = not can_clone(store)
    if not shared:
        store = store.clone()  # a blocked read holds the client's lock
    timeout = timedelta(seconds=timeout_s)
    has_nccl = "nccl" in str(dist.get_backend_config(parent))
    if has_nccl and not shared:
        store.set_timeout(timeout)  # for the exchange of NCCL's identifier
    group: dist.ProcessGroup = _c10d._new_process_group_helper(  # noqa: SLF001 - see the module's docstring
        len(ranks),
        dist.get_rank(parent),
        ranks,
        dist.get_backend(parent),
        store,
        name,
        backend_options=_nccl_options(timeout) if has_nccl else None,
        timeout=timeout,
        pg_tag=name,
        group_desc="comm_core: a backend's own group",
    )[0]
    world = _c10d._world  # noqa: SLF001
    world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    # torch names the groups of `new_group(use_local_synchronization=True)` by the number of names, and finds groups of
    # given ranks by their tag: this group must not be counted, nor found.
    names = world.pg_names
    names.pop(group, None)
    if names is _c10d._pg_names and not isinstance(names, _Names):  # noqa: SLF001
        _c10d._pg_names = _Names(names)  # noqa: SLF001
    world.tags_to_pg.pop(world.pg_to_tag.pop(group, None), None)
    if has_nccl:
        for backend in _backends(group):
            if isinstance(backend, dist.ProcessGroupNCCL):
                backend._set_default_timeout(timeout + timedelta(seconds=_NCCL_GRACE_S))  # noqa: SLF001
    return group


def _nccl_options(timeout: timedelta) -> Any:
    """Return options with which torch doesn't split the new communicator from the job's.

    It does that if the default group is bound to a device, and then every rank of the job would have to take part.
    """

    class Unsplit(dist.ProcessGroupNCCL.Options):
        split_from = property(lambda _self: None, lambda _self, _backend: None)

    options = Unsplit()
    options._timeout = timeout  # noqa: SLF001 - torch warns if it differs from its own argument
    return options


def _backends(group: dist.ProcessGroup) -> list[Any]:
    """Return the group's backends; one that serves several kinds of devices once."""
    found: list[Any] = []
    for device in group._device_types:  # noqa: SLF001
        backend = group._get_backend(device)  # noqa: SLF001
        backend = getattr(backend, "wrapped_pg", backend)  # the wrapper of TORCH_DISTRIBUTED_DEBUG=DETAIL
        if all(backend is not other for other in found):
            found.append(backend)
    return found


def _abort(group: dist.ProcessGroup, title: str) -> None:
    """Remove a group from torch's registries, and end its connections and the calls that wait in it."""
    world = _c10d._world  # noqa: SLF001
    for registry in (world.pg_map, world.pg_group_ranks, world.pg_backend_config, world.pg_coalesce_state):
        registry.pop(group, None)
    with contextlib.suppress(RuntimeError):  # torch has destroyed the job's groups, and forgotten all names
        _c10d._unregister_process_group(group.group_name)  # noqa: SLF001
    for backend in _backends(group):
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
