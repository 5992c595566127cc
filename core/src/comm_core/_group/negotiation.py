"""One group's negotiation, step by step: probe, exchange, ask, decide, connect and admit.

Every rank runs the same steps, since each step follows from the exchange of the step before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from comm_core._control.store import Control
from comm_core._group.ask import ask_backends
from comm_core._group.connect import connect_and_admit
from comm_core._group.exchange import exchange_evidence
from comm_core._group.local_inputs import LocalInputs, device_types_of
from comm_core._group.membership import Membership
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._group.outcome import report_outcome
from comm_core.topology import Topology

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["negotiate"]


def negotiate(group: dist.ProcessGroup, title: str, control: Control, local: LocalInputs) -> NegotiatedGroup:
    """Negotiate a group's decision and sessions. Collective; succeeds or fails on all ranks together.

    Args:
        group: the process group.
        title: its name in messages.
        control: its control channel, in a new incarnation.
        local: this rank's inputs.

    Raises:
        NegotiationError: the ranks' settings or releases of comm-core differ, a rank can't negotiate, or it sent a
            message that can't be read.
        BackendUnavailableError: a backend that the caller named can't serve.
        StageAbortedError: a rank failed or didn't arrive in time.
    """
    evidence = exchange_evidence(control, local.evidence)
    topology = Topology.of((item.info for item in evidence), device_types_of(group, local.device))

    slate = ask_backends(control, local, evidence, topology)
    timeout_s = local.connect_timeout_s
    member = Membership.of(group, topology, control, local.device, local.settings, timeout_s, local.wire)
    admitted, sessions = connect_and_admit(slate, local.plugins, member)
    negotiated = NegotiatedGroup.of(admitted, slate, sessions, local.plugins, member)
    broken = {name for item in evidence for name in item.failures}
    report_outcome(negotiated, title, control, local, broken)
    return negotiated
