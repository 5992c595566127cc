"""Who takes part: the terminal fallback, this group's backends, peers whose packages are installed, and limits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import comm_core as comm
from comm_core import env

from comm_bench import peer_flashinfer, peer_nccl, peer_sglang, peer_torch
from comm_bench.contenders import Absent, Contender, Job, backends, terminal
from comm_bench.limits import limits

__all__ = ["Roster", "assemble"]

_log = logging.getLogger("comm_bench")
# Each has a function `peers(job, ops, capacity, hidden_size)`: names, and what makes a contender.
_PEERS = (peer_nccl, peer_torch, peer_sglang, peer_flashinfer)


@dataclasses.dataclass
class Roster:
    """The contenders, and who isn't among them and why; equal on every rank.

    Attributes:
        contenders: the terminal fallback first, limits last.
        absent: reasons by name.
        topology: of the group.
    """

    contenders: list[Contender]
    absent: dict[str, str]
    topology: comm.Topology

    def prepare(self, shapes: comm.Shapes) -> None:
        """Have the backends do what `comm.pre_capture_init` has them do; who can't is absent from then on. Collective.

        Args:
            shapes: the largest of the fused operation.
        """
        try:
            comm.pre_capture_init(**dataclasses.asdict(shapes))
        except comm.BackendUnavailableError:
            lost = {contender: contender.lost() for contender in self.contenders if contender.lost()}
            if not lost:
                raise
            for contender, reason in lost.items():
                self.absent[contender.name] = reason
                self.contenders.remove(contender)
                contender.close()
            # It tells of one failure alone.
            self.prepare(shapes)

    def close(self) -> None:
        """Give everything back. Collective."""
        for contender in reversed(self.contenders):
            contender.forget()
            try:
                contender.close()
            except Exception:  # noqa: BLE001 - a contender's border: everything is measured, and is to be told
                _log.warning("comm-core bench: %s can't be closed", contender.name, exc_info=True)
        self.contenders.clear()


def assemble(job: Job, ops: Sequence[str], capacity: int, hidden_size: int, only: Sequence[str]) -> Roster:
    """Find and connect everybody. Collective.

    Args:
        job: the ranks.
        ops: what is measured.
        capacity: bytes of the largest message.
        hidden_size: the largest; 0 without the fused operation.
        only: names of the backends and peers that are wanted; empty for all. The terminal fallback is always there, and
            so are the limits.
    """
    handle = comm.get_backend()
    roster = Roster([terminal(job)], {}, handle.topology)
    for found in backends(handle.decision, only):
        if isinstance(found, Contender):
            roster.contenders.append(found)
        else:
            roster.absent[found[0]] = found[1]
    makers = [each for peer in _PEERS for each in peer.peers(job, ops, capacity, hidden_size)]
    known = {name for name, _ in makers} | {candidate.name for candidate in handle.decision.candidates}
    roster.absent |= {name: "no backend that is installed, and no peer" for name in only if name not in known}
    makers = [each for each in makers if not only or each[0] in only]
    deadline_s = env.Settings.read().connect_timeout_s
    for name, make in [*makers, *limits(job, capacity)]:
        try:
            with job.watch.step(f"{name}, while it is set up", deadline_s):
                roster.contenders.append(job.together(make))
        except Absent as reason:  # noqa: PERF203 - one that can't doesn't keep the others out
            roster.absent[name] = str(reason)
    return roster
