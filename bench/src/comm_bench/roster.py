"""The contenders of a run: the terminal fallback, this group's backends, the installed peers, and the limits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import comm_core as comm
from comm_core import env

from comm_bench import peer_flashinfer, peer_nccl, peer_sglang, peer_torch
from comm_bench.backends import backends, terminal
from comm_bench.contenders import Absent, Contender, Job
from comm_bench.limits import limits

__all__ = ["Roster", "UnknownContenderError", "assemble"]

_log = logging.getLogger("comm_bench")
# Each has a function `peers(job, ops, capacity, hidden_size)`, which returns names and factories. All ranks call a
# factory together; it returns a contender or raises `Absent`.
_PEERS = (peer_nccl, peer_torch, peer_sglang, peer_flashinfer)


class UnknownContenderError(LookupError):
    """A contender was asked for that nothing installed has the name of."""


@dataclasses.dataclass
class Roster:
    """The contenders, and the reasons that others are absent; equal on every rank.

    Attributes:
        contenders: the terminal fallback first, limits last.
        absent: the reasons, by name.
        topology: the group's topology.
    """

    contenders: list[Contender]
    absent: dict[str, str]
    topology: comm.Topology

    def prepare(self, shapes: comm.Shapes) -> None:
        """Call `comm.pre_capture_init`, and move each backend that fails from `contenders` to `absent`. Collective.

        Args:
            shapes: the fused operation's largest shapes.
        """
        try:
            comm.pre_capture_init(**dataclasses.asdict(shapes))
        except comm.BackendUnavailableError:
            failed = {each: reason for each in self.contenders if (reason := each.failure_reason())}
            if not failed:
                raise
            for contender, reason in failed.items():
                self.absent[contender.name] = reason
                self.contenders.remove(contender)
                contender.close()
            # The call reports one failure at a time: try again without this backend.
            self.prepare(shapes)

    def close(self) -> None:
        """Close all contenders. Collective."""
        for contender in reversed(self.contenders):
            contender.release()
            try:
                contender.close()
            except Exception:  # noqa: BLE001 - other libraries' code; the results are complete and still to be reported
                _log.warning("comm-core bench: %s can't be closed", contender.name, exc_info=True)
        self.contenders.clear()


def assemble(
    job: Job, ops: Sequence[str], capacity: int, hidden_size: int, only: Sequence[str], *, extras: bool = True
) -> Roster:
    """Find and connect all contenders. Collective.

    Args:
        job: the ranks.
        ops: the measured operations.
        capacity: the largest message, in bytes.
        hidden_size: the largest hidden size; 0 without the fused operation.
        only: names of the backends and peers to measure; empty for all. The terminal fallback and the limits are always
            measured.
        extras: whether peers and limits take part.

    Raises:
        UnknownContenderError: no installed backend or peer has one of these names; on all ranks.
    """
    handle = comm.get_backend(wire="")
    makers = [each for peer in _PEERS for each in peer.peers(job, ops, capacity, hidden_size)] if extras else []
    known = {name for name, _ in makers} | {candidate.name for candidate in handle.decision.candidates}
    if unknown := sorted(set(only) - known):
        raise UnknownContenderError(
            f"no installed backend or peer has the name {', '.join(unknown)}; choose from {', '.join(sorted(known))}"
        )
    roster = Roster([terminal(job)], {}, handle.topology)
    for found in backends(handle.decision, only, quantized=any(":" in op for op in ops)):
        if isinstance(found, Contender):
            roster.contenders.append(found)
        else:
            roster.absent[found[0]] = found[1]
    makers = [each for each in makers if not only or each[0] in only]
    deadline_s = env.Settings.read().connect_timeout_s
    for name, make in [*makers, *(limits(job, capacity, roster.topology) if extras else ())]:
        try:
            with job.watchdog.step(f"set-up of {name}", deadline_s):
                roster.contenders.append(job.run_collectively(make))
        except Absent as reason:  # noqa: PERF203 - the other contenders still follow
            roster.absent[name] = str(reason)
    return roster
