"""Connect and admit a group's candidates, in order, until every route has an owner that passed its admission."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from comm_core._control.channel import SessionChannel
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._group.admission import admit
from comm_core._group.membership import Membership, abort_stage, check_budget, run_in_worker
from comm_core._handle.session import Session, close_value
from comm_core._plan.cases import AdmissionCase, next_to_test, untestable_cells
from comm_core._plan.decide import Slate
from comm_core._plan.routes import owners, plan_routes
from comm_core._plugins.discovery import Plugin

__all__ = ["connect_and_admit", "drop", "ensure_connected"]


def connect_and_admit(
    slate: Slate, plugins: Mapping[str, Plugin], member: Membership, before: Mapping[str, Session] | None = None
) -> tuple[Slate, dict[str, Session]]:
    """Connect and admit each candidate that would own a route, best first; replan after each failure. Collective.

    Every rank takes the same steps, since each step follows from votes.

    Args:
        slate: the candidates; equal on every rank.
        plugins: this rank's plugins, by name.
        member: the group and this rank in it.
        before: the sessions that exist already, by name.

    Returns:
        The slate of the candidates that serve, and their sessions by name. Sessions of `before` that are in use and
        didn't fail are included.
    """
    sessions = dict(before or {})
    try:
        while True:
            routes = plan_routes(slate.offers, member.topology.device_types)
            for idle in sessions.keys() - owners(routes):
                # Candidates admitted since then own all its routes.
                if not sessions[idle].in_use:
                    sessions.pop(idle).close(orderly=False)
            tested = {name: session.tested for name, session in sessions.items()}
            name, cases = next_to_test(slate.offers, routes, tested)
            if name is None:
                return slate, sessions
            untestable = untestable_cells(routes, name)
            if untestable:
                failures = dict.fromkeys(untestable, ("the admission test can't test any of its sizes", None))
                slate = slate.without_cells(name, failures, member.topology.device_types)
            else:
                slate = _connect_and_test(slate, name, cases, plugins[name], sessions, member)
    except BaseException:
        for session in sessions.values():
            session.release()
        raise


def _connect_and_test(
    slate: Slate,
    name: str,
    cases: list[AdmissionCase],
    plugin: Plugin,
    sessions: dict[str, Session],
    member: Membership,
) -> Slate:
    """Connect a backend, if it has no session yet, and test its cases; return the new slate."""
    slate = ensure_connected(slate, plugin, sessions, member)
    if name not in sessions:
        return slate
    failures = admit(sessions[name], cases, member)
    if isinstance(failures, StageAbortedError):
        return drop(slate, name, "admission", failures, sessions, member)
    sessions[name].mark_failed(failures)
    return slate.without_cells(name, failures, member.topology.device_types) if failures else slate


def ensure_connected(slate: Slate, plugin: Plugin, sessions: dict[str, Session], member: Membership) -> Slate:
    """Connect a backend, if it has no session yet; return the new slate. Collective."""
    if plugin.name in sessions:
        return slate
    budget = member.context.memory_budget_nbytes - sum(session.memory_nbytes for session in sessions.values())
    outcome = _connect(plugin, slate.offer(plugin.name).checks_operands, member, budget)
    if isinstance(outcome, StageAbortedError):
        return drop(slate, plugin.name, "", outcome, sessions, member)
    sessions[plugin.name] = outcome
    return slate


def drop(
    slate: Slate, name: str, step: str, error: StageAbortedError, sessions: dict[str, Session], member: Membership
) -> Slate:
    """Drop a backend that failed in a step; return the slate without it. Collective.

    Returns once every rank has left the step and released the session. A wait inside the plugin may keep a rank in the
    step until its deadline; the next backend's deadline starts after that.
    """
    session = sessions.pop(name, None)
    if session is not None:
        session.release()
    stage_name = f"{member.stage_prefix}drop {name}"
    with contextlib.suppress(StageAbortedError), Stage(member.control, stage_name, member.stage_timeout_s) as stage:
        stage.barrier()
    return slate.without(name, f"{step}: {error.reason}" if step else error.reason, error.rank)


def _connect(plugin: Plugin, checks_operands: bool, member: Membership, budget: int) -> Session | StageAbortedError:
    """Run a plugin's `connect` on every rank and vote: either every rank gets a session, or every rank an error."""
    channel = SessionChannel()
    own_group = member.own_group(plugin.name)
    context = dataclasses.replace(
        member.context,
        group=own_group.get,  # type: ignore[arg-type]  # each read calls it
        control=channel,
        memory_budget_nbytes=budget,
    )
    hook = plugin.hooks.get("connect")
    session: Session | None = None
    try:
        stage_name = f"{member.stage_prefix}connect {plugin.name}"
        with channel.open_stage(member.control, stage_name, member.stage_timeout_s) as stage:
            try:
                value: Any = context
                if hook is not None:
                    call = functools.partial(hook, member.topology, context)
                    on_late = functools.partial(close_value, plugin, orderly=False)
                    value = run_in_worker(call, member, f"connect of {plugin.name}", synchronize=False, on_late=on_late)
                if value is None:
                    raise TypeError("connect returned None, not a session")
                session = Session(plugin, value, channel, checks_operands, own_group=own_group)
                check_budget(session.reported_memory_nbytes, budget)
            except StageAbortedError:
                raise
            except Exception as error:  # plugin boundary: its failure aborts the stage on all ranks
                raise abort_stage(stage, member, error) from error
            votes = stage.all_gather(session.reported_memory_nbytes, "vote")
            session.count_memory(member.read_memory(votes))
    except BaseException as error:
        # First, as in `Session.release`. A hook that still runs, or that returned its session too late, loses it too.
        own_group.close(tell_peers=True)
        if session is not None:
            session.close(orderly=False)
        if isinstance(error, StageAbortedError):
            return error
        raise
    return session
