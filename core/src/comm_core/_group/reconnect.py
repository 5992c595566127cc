"""The second half of `comm.recover`: let go of a group's sessions, and connect the backends that remain again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from comm_core._control.store import Control, store_of
from comm_core._control.worker import run_on_device
from comm_core._group.connect import connect_and_admit
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._group.states import GroupState, used_incarnations
from comm_core._handle.session import Session, close_all
from comm_core._plan.decide import Slate

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["change_incarnation", "reconnect", "release_sessions"]


def release_sessions(state: GroupState, negotiated: NegotiatedGroup) -> list[Session]:
    """Close the group's sessions; only end their waits if graphs may have their calls. Local.

    A graph that was captured before may be replayed by mistake, and its kernels would write to freed memory.

    Returns:
        Of the sessions that stay open, those that can tell by the hook `check` that a kernel has run since.

    Raises:
        KeyboardInterrupt: a session's `close` was interrupted; after all are closed.
    """
    timeout_s = negotiated.member.close_timeout_s
    for session in state.sessions:
        session.abort()
    if _may_be_in_graphs(negotiated):
        return [session for session in state.sessions if _notices_replays(session, timeout_s)]
    sessions, state.sessions = state.sessions, []
    for session in sessions:
        session.abort_own_group()
    close_all(sessions, timeout_s=timeout_s)
    return []


def _may_be_in_graphs(negotiated: NegotiatedGroup) -> bool:
    """Return whether graphs may have calls of the group: they are recorded without core's knowledge, too."""
    return "cuda" in negotiated.topology.device_types


def _notices_replays(session: Session, timeout_s: float) -> bool:
    """Return whether the hook `check` is silent about what it has reported once, so that it can report a replay."""
    hook = session.plugin.hooks.get("check")
    if hook is None:
        return False
    check = functools.partial(
        run_on_device,
        functools.partial(hook, session.value),
        session.device,
        timeout_s,
        f"check of {session.plugin.name}",
    )
    with contextlib.suppress(Exception):  # the failure
        check()
    try:
        check()
    except Exception:  # noqa: BLE001 - plugin boundary: whatever it reports again, it would report each time
        return False
    return True


def change_incarnation(state: GroupState, group: dist.ProcessGroup, old: Control, timeout_s: float | None) -> Control:
    """Join a new incarnation of the group, and leave the old one: the ranks' numbers of calls may differ there.

    Args:
        state: the group's state.
        group: the process group.
        old: its control channel.
        timeout_s: the deadline of the exchanges to come, in seconds; None: as before.

    Raises:
        CommError: the store is gone.
    """
    timeout_s = old.timeout_s if timeout_s is None else timeout_s
    control = Control(store_of(group), old.rank, old.global_ranks, timeout_s)
    control.join(used_incarnations.setdefault(state.name, set()))
    old.finish()
    state.change_incarnation(control)
    return control


def reconnect(
    state: GroupState,
    negotiated: NegotiatedGroup,
    control: Control,
    failed: Mapping[str, tuple[str, int]],
    timeout_s: float | None,
) -> NegotiatedGroup:
    """Connect and admit the backends that haven't failed, as `get_backend` does. Collective.

    Args:
        state: the group, whose sessions are released.
        negotiated: the outcome before.
        control: the group's control channel, in a new incarnation.
        failed: the backends that fail now, with the reasons and the group ranks that gave them.
        timeout_s: the deadline of each `connect` and each admission test, in seconds; None: as in `get_backend`.

    Returns:
        The new outcome.

    Raises:
        StageAbortedError: a rank left or vanished.
    """
    member = dataclasses.replace(negotiated.member, control=control)
    kept_nbytes = sum(session.memory_nbytes for session in state.sessions)
    left_nbytes = max(member.context.memory_budget_nbytes - kept_nbytes, 0)
    connecting = dataclasses.replace(
        member,
        connect_timeout_s=member.connect_timeout_s if timeout_s is None else timeout_s,
        context=dataclasses.replace(member.context, memory_budget_nbytes=left_nbytes),
    )
    slate = _slate_without(negotiated, failed)
    slate, sessions = connect_and_admit(slate, negotiated.plugins, connecting)
    planned = NegotiatedGroup.of(slate, negotiated.asked_slate, sessions, negotiated.plugins, member)
    return dataclasses.replace(planned, kept_nbytes=kept_nbytes)


def _slate_without(negotiated: NegotiatedGroup, failed: Mapping[str, tuple[str, int]]) -> Slate:
    """Return the group's first slate without the backends that failed before or fail now."""
    slate = negotiated.asked_slate
    for candidate in negotiated.slate.dropped:
        if candidate.verdict == "failed":
            slate = slate.without(candidate.name, candidate.reason, candidate.rank)
    for name, (reason, rank) in failed.items():
        if any(offer.name == name for offer in slate.offers):
            slate = slate.without(name, reason, rank)
    return slate
