"""Who of the group runs on this machine, and whether it still does.

NCCL notices by itself that a peer has gone only where a network is between them: over NVLink, PCIe and shared memory
its kernels wait for ever. The machine's own kernel tells, through a descriptor a process.
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

__all__ = ["Processes", "Watch", "introduce", "open_processes"]

# Between two questions to NCCL, in seconds: its own detection takes longer, and a question under a microsecond.
_INTERVAL_S = 1.0


class Processes:
    """The peers' processes on this machine.

    Attributes:
        ranks: group ranks by descriptor, which becomes readable when the process ends.
    """

    def __init__(self, descriptors: Mapping[int, int], labels: Mapping[int, str]) -> None:
        self.ranks = dict(descriptors)
        self._labels = dict(labels)

    def ended(self, timeout_s: float = 0.0) -> tuple[int, ...]:
        """The group ranks whose process has ended, after waiting for one at most so long."""
        poller = select.poll()
        for descriptor in self.ranks:
            poller.register(descriptor, select.POLLIN)
        return tuple(sorted(self.ranks[descriptor] for descriptor, _ in poller.poll(timeout_s * 1000)))

    def error(self, ranks: tuple[int, ...]) -> comm.CommTimeoutError:
        """What is to be raised where these have ended."""
        return comm.CommTimeoutError(", ".join(f"{self._labels[rank]} has ended" for rank in ranks), ranks)

    def close(self) -> None:
        """Let go of the descriptors."""
        for descriptor in self.ranks:
            os.close(descriptor)
        self.ranks.clear()


def introduce() -> dict[str, Any]:
    """What the peers have to know to open this process."""
    return {"pid": os.getpid(), "namespace": str(Path("/proc/self/ns/pid").readlink())}


def open_processes(
    topology: comm.Topology, rank: int, global_ranks: Sequence[int], introduced: Sequence[Mapping[str, Any]]
) -> Processes:
    """Open the peers that run on this machine in this process's PID namespace.

    Others, and all of them where the kernel is older than Linux 5.3 or a container forbids it, stay unwatched.

    Args:
        topology: the group.
        rank: this process's, in the group.
        global_ranks: the job's rank of each group rank.
        introduced: by group rank, what each one's `introduce` said.

    Raises:
        CommTimeoutError: one has ended already.
    """
    machine, mine = topology.ranks[rank].host.boot_id, introduced[rank]
    descriptors: dict[int, int] = {}
    labels: dict[int, str] = {}
    for peer, its in enumerate(introduced):
        here = machine is not None and topology.ranks[peer].host.boot_id == machine
        if peer == rank or not here or its["namespace"] != mine["namespace"]:
            continue
        labels[peer] = f"rank {rank_label(peer, global_ranks[peer])}, process {its['pid']},"
        try:
            descriptors[os.pidfd_open(its["pid"])] = peer
        except ProcessLookupError:
            Processes(descriptors, labels).close()
            raise Processes({}, labels).error((peer,)) from None
        except OSError:
            continue
    return Processes(descriptors, labels)


class Watch:
    """A thread that sees peers end, and asks now and then for NCCL's own errors.

    Args:
        processes: taken over: closed with the thread.
        see: given the ranks that have ended, mostly none; returns whether it has seen enough.
    """

    def __init__(self, processes: Processes, see: Callable[[tuple[int, ...]], bool]) -> None:
        self._processes = processes
        self._see = see
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
                ready = {descriptor for descriptor, _ in poller.poll(_INTERVAL_S * 1000)}
                gone = sorted(self._processes.ranks[descriptor] for descriptor in ready - {self._read})
                if self._read in ready or self._see(tuple(gone)):
                    return
