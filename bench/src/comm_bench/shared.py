"""A buffer on each rank that kernels of all ranks can address, from `comm_core.memory`."""

from __future__ import annotations

from typing import Any

import comm_core as comm
from comm_core import env, memory
from comm_core.command import describe

from comm_bench.contenders import Absent, Job

__all__ = ["share_buffer"]


def share_buffer(job: Job, nbytes: int, *, fabric: bool = False) -> memory.SharedBuffer:
    """Allocate a buffer on every rank, and map all ranks' buffers on every rank. Collective.

    Args:
        job: the ranks.
        nbytes: the size of each buffer.
        fabric: whether the ranks are on several hosts, all in one NVLink clique.

    Raises:
        Absent: a rank can't share memory; the same on every rank.
    """
    channel = _Channel(job)
    ranks = tuple(range(job.world_size))
    timeout_s = env.Settings.read().wait_timeout_s
    context = comm.GroupContext(job.world, job.rank, job.world_size, job.device, ranks, channel, nbytes, timeout_s)
    try:
        missing = memory.missing() if job.device.type == "cuda" else None
        if missing is not None:
            raise Absent(missing)
        return memory.share(nbytes, context, fabric=fabric)
    except _PeerFailed as failed:
        reason = str(failed)
    except Exception as error:  # noqa: BLE001 - raised below, on all ranks; the peers would wait for this one
        reason = str(error) if isinstance(error, Absent) else describe(error)
        try:
            channel.fail(reason)
        except _PeerFailed as failed:
            reason = str(failed)
    raise Absent(f"no shared memory: {reason}")


class _PeerFailed(Exception):  # noqa: N818 - a message to `share_buffer`
    """The first failed rank and its reason, which all ranks have received in one exchange."""


class _Channel:
    """A `ControlChannel` over the job's own exchange, in which a rank can fail instead of sending a value."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank."""
        return self._exchange(value, "")

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        self._exchange(None, "")

    def agree(self, ok: bool, reason: str = "") -> comm.Agreement:
        """Vote, and return the result of the vote."""
        votes = self._exchange((ok, reason), "")
        reasons = {rank: why for rank, (yes, why) in enumerate(votes) if not yes}
        return comm.Agreement(not reasons, reasons)

    def fail(self, reason: str) -> None:
        """Raise on all ranks, on the others in the exchange that comes next there."""
        self._exchange(None, reason or "an unknown error")

    def _exchange(self, value: Any, failure: str) -> list[Any]:
        everyone = self._job.all_gather((value, failure))
        for rank, (_, reason) in enumerate(everyone):
            if reason:
                raise _PeerFailed(f"rank {rank}: {reason}")
        return [each for each, _ in everyone]
