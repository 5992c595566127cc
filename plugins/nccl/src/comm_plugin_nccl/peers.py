"""The peers' processes on this machine: how one says that it has stopped, and a thread that notices that, or its end.

NCCL notices that a peer is gone only if a network is between them: over NVLink, PCIe and shared memory its kernels wait
forever. It never notices that a peer has stopped calling. The operating system reports the end of a process through a
descriptor (pidfd); for a stop, each process has a pipe, to which it writes one byte and which its peers open for
reading.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comm_core as comm
from comm_core.types import rank_label

__all__ = ["OwnProcess", "PeerEvent", "PeerProcesses", "Watcher", "error_of", "open_processes"]

# The interval between two queries of NCCL's errors, in seconds. NCCL takes longer to detect one, and a query takes less
# than a microsecond.
_POLL_S = 1.0


class OwnProcess:
    """This process, as the peers of one session watch it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe = os.pipe()
        self._open = True

    def describe(self) -> dict[str, Any]:
        """Return what peers need to watch this process, as JSON."""
        namespace = str(Path("/proc/self/ns/pid").readlink())
        return {"pid": os.getpid(), "namespace": namespace, "pipe": self._pipe[0]}

    def stop(self) -> None:
        """Let the peers notice that this rank makes no further calls. Nothing after `close`."""
        with self._lock:
            if self._open:
                os.write(self._pipe[1], b"\0")

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._pipe[0])
                os.close(self._pipe[1])


class PeerEvent(NamedTuple):
    """The end of a peer's process, or its stop: its group rank, which of them, and a sentence without a full stop."""

    rank: int
    ended: bool
    text: str


class PeerProcesses:
    """The peers' processes on this machine.

    Attributes:
        events: by descriptor; the event has happened once the descriptor can be read.
    """

    def __init__(self, events: Mapping[int, PeerEvent]) -> None:
        self.events = dict(events)

    def poll(self, timeout_s: float = 0.0) -> tuple[PeerEvent, ...]:
        """Return what has happened; wait for the first event at most `timeout_s` seconds."""
        poller = select.poll()
        for descriptor in self.events:
            poller.register(descriptor, select.POLLIN)
        ready = poller.poll(timeout_s * 1000)
        return tuple(sorted(self.events[descriptor] for descriptor, mask in ready if mask & select.POLLIN))

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.events:
            os.close(descriptor)
        self.events.clear()


def error_of(events: Sequence[PeerEvent]) -> comm.CommTimeoutError:
    """Return the exception to raise after these events. Another peer may have stopped because one ended."""
    causes = [event for event in events if event.ended] or events
    return comm.CommTimeoutError("; ".join(event.text for event in causes), tuple(event.rank for event in causes))


def open_processes(
    topology: comm.Topology, rank: int, global_ranks: Sequence[int], processes: Sequence[Mapping[str, Any]]
) -> PeerProcesses:
    """Open the peers' processes on this machine that are in this process's PID namespace.

    Other processes aren't watched; nor is any process before Linux 5.3, or in a container that forbids it.

    Args:
        topology: the group.
        rank: this process's group rank.
        global_ranks: the job's rank of each group rank.
        processes: each group rank's `OwnProcess.describe()`.

    Raises:
        CommTimeoutError: a process has already ended.
    """
    machine, own = topology.ranks[rank].host.boot_id, processes[rank]
    opened = PeerProcesses({})
    for peer, process in enumerate(processes):
        here = machine is not None and topology.ranks[peer].host.boot_id == machine
        if peer == rank or not here or process["namespace"] != own["namespace"]:
            continue
        pid = process["pid"]
        label = f"rank {rank_label(peer, global_ranks[peer])}, process {pid}, has"
        ended = PeerEvent(peer, True, f"{label} ended")
        try:
            opened.events[os.pidfd_open(pid)] = ended
        except ProcessLookupError:
            opened.close()
            raise error_of([ended]) from None
        except OSError:
            continue
        with contextlib.suppress(OSError):
            pipe = os.open(f"/proc/{pid}/fd/{process['pipe']}", os.O_RDONLY | os.O_NONBLOCK)
            opened.events[pipe] = PeerEvent(peer, False, f"{label} stopped, and makes no further calls")
    return opened


class Watcher:
    """A thread that notices when peers end or stop, and queries NCCL's errors once a second.

    Args:
        processes: the peers; the thread closes them when it ends.
        on_wake: called with the events, usually none; returns whether the thread is to end.
    """

    def __init__(self, processes: PeerProcesses, on_wake: Callable[[tuple[PeerEvent, ...]], bool]) -> None:
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
        events = self._processes.events
        poller = select.poll()
        for descriptor in (self._read, *events):
            poller.register(descriptor, select.POLLIN)
        with contextlib.ExitStack() as stack:
            stack.callback(self._processes.close)
            stack.callback(os.close, self._read)
            while True:
                ready = dict(poller.poll(_POLL_S * 1000))
                if self._read in ready:
                    return
                for descriptor, mask in ready.items():
                    if not mask & select.POLLIN:  # the peer has closed its pipe, since it has closed its session
                        poller.unregister(descriptor)
                happened = sorted(events[descriptor] for descriptor, mask in ready.items() if mask & select.POLLIN)
                if self._on_wake(tuple(happened)):
                    return
