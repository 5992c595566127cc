"""The peers' processes on this machine, and a thread that notices when one ends.

NCCL notices that a peer is gone only if a network is between them: over NVLink, PCIe and shared memory its kernels wait
forever. The operating system reports the end of a process through a descriptor (pidfd).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comm_core as comm
from comm_core.types import rank_label

__all__ = ["PeerProcesses", "Watcher", "open_processes", "own_process"]

# The interval between two queries of NCCL's errors, in seconds. NCCL takes longer to detect one, and a query takes less
# than a microsecond.
_POLL_S = 1.0


class PeerProcesses:
    """The peers' processes on this machine.

    Attributes:
        ranks: group ranks by descriptor; a descriptor becomes readable when its process ends.
    """

    def __init__(self, descriptors: Mapping[int, int], labels: Mapping[int, str]) -> None:
        self.ranks = dict(descriptors)
        self._labels = dict(labels)

    def poll_ended(self, timeout_s: float = 0.0) -> tuple[int, ...]:
        """Return the group ranks with processes that have ended; wait for the first one at most `timeout_s` seconds."""
        poller = select.poll()
        for descriptor in self.ranks:
            poller.register(descriptor, select.POLLIN)
        return tuple(sorted(self.ranks[descriptor] for descriptor, _ in poller.poll(timeout_s * 1000)))

    def ended_error(self, ranks: tuple[int, ...]) -> comm.CommTimeoutError:
        """Return the exception to raise after these ranks' processes have ended."""
        return comm.CommTimeoutError(", ".join(f"{self._labels[rank]} has ended" for rank in ranks), ranks)

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.ranks:
            os.close(descriptor)
        self.ranks.clear()


def own_process() -> dict[str, Any]:
    """Describe this process, so that peers can open it."""
    return {"pid": os.getpid(), "namespace": str(Path("/proc/self/ns/pid").readlink())}


def open_processes(
    topology: comm.Topology, rank: int, global_ranks: Sequence[int], processes: Sequence[Mapping[str, Any]]
) -> PeerProcesses:
    """Open the peers' processes on this machine that are in this process's PID namespace.

    Other processes aren't watched; nor is any process before Linux 5.3, or in a container that forbids it.

    Args:
        topology: the group.
        rank: this process's group rank.
        global_ranks: the job's rank of each group rank.
        processes: the result of each group rank's `own_process`.

    Raises:
        CommTimeoutError: a process has already ended.
    """
    machine, own = topology.ranks[rank].host.boot_id, processes[rank]
    descriptors: dict[int, int] = {}
    labels: dict[int, str] = {}
    for peer, process in enumerate(processes):
        here = machine is not None and topology.ranks[peer].host.boot_id == machine
        if peer == rank or not here or process["namespace"] != own["namespace"]:
            continue
        labels[peer] = f"rank {rank_label(peer, global_ranks[peer])}, process {process['pid']},"
        try:
            descriptors[os.pidfd_open(process["pid"])] = peer
        except ProcessLookupError:
            PeerProcesses(descriptors, labels).close()
            raise PeerProcesses({}, labels).ended_error((peer,)) from None
        except OSError:
            continue
    return PeerProcesses(descriptors, labels)


class Watcher:
    """A thread that notices when peers end, and queries NCCL's errors once a second.

    Args:
        processes: the peers; the thread closes them when it ends.
        on_wake: called with the ranks that have ended, usually none; returns whether the thread is to end.
    """

    def __init__(self, processes: PeerProcesses, on_wake: Callable[[tuple[int, ...]], bool]) -> None:
        self._processes = processes
        self._on_wake = on_wake
        self._read, self._write = os.pipe()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="comm-core nccl: watch", daemon=True).start()

    def stop(self) -> None:
        """End the thread, without waiting for it."""
        with self._lock:
            if self._write >= 0:
                os.close(self._write)
            self._write = -1

    def _run(self) -> None:
        poller = select.poll()
        for descriptor in (self._read, *self._processes.ranks):
            poller.register(descriptor, select.POLLIN)
        with contextlib.ExitStack() as stack:
            stack.callback(self._processes.close)
            stack.callback(os.close, self._read)
            while True:
                ready = {descriptor for descriptor, _ in poller.poll(_POLL_S * 1000)}
                ended = sorted(self._processes.ranks[descriptor] for descriptor in ready - {self._read})
                if self._read in ready or self._on_wake(tuple(ended)):
                    return
