"""Connect and admit the candidates of a group, in order, until every route has an owner that was seen to work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from comm_core._control.channel import SessionChannel
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._group.admit import admit
from comm_core._group.membership import Membership, abort_stage, check_budget, in_worker
from comm_core._handle.session import Session, close_value
from comm_core._plan.cases import AdmissionCase, next_to_test, untestable_cells
from comm_core._plan.decide import Slate
from comm_core._plan.routes import owners, plan_routes
from comm_core._plugins.discovery import Plugin

__all__ = ["connect_and_admit", "drop", "ensure_connected"]


def connect_and_admit(
    slate: Slate, plugins: Mapping[str, Plugin], member: Membership, before: Mapping[str, Session] | None = None
) -> tuple[Slate, dict[str, Session]]:
    """Connect and admit whoever would own a route, best first; drop who fails and plan anew. Collective.

    Every rank takes the same steps, since each follows from votes.

    Args:
        slate: the candidates; equal on every rank.
        plugins: this rank's plugins, by name.
        member: the group and this rank in it.
        before: the sessions that there are already, by name.

    Returns:
        The slate of those that serve, and their sessions by name; with them those of `before` that are in use and
        didn't fail.
    """
    sessions = dict(before or {})
    try:
        while True:
            routes = plan_routes(slate.offers, member.topology.device_types)
            for idle in sessions.keys() - owners(routes):
                # Whoever was admitted since takes all that it had.
                if not sessions[idle].in_use:
                    sessions.pop(idle).close(orderly=False)
            name, todo = next_to_test(slate.offers, routes, {name: each.tested for name, each in sessions.items()})
            if name is None:
                return slate, sessions
            untestable = untestable_cells(routes, name)
            if untestable:
                wrong = dict.fromkeys(untestable, ("no size of it can be tested", None))
                slate = slate.without_cells(name, wrong, member.topology.device_types)
            else:
                slate = _try(slate, name, todo, plugins[name], sessions, member)
    except BaseException:
        for session in sessions.values():
            session.release()
        raise


def _try(
    slate: Slate,
    name: str,
    todo: list[AdmissionCase],
    plugin: Plugin,
    sessions: dict[str, Session],
    member: Membership,
) -> Slate:
    """Connect a backend where it isn't yet and put it through its cases; the slate that comes of it."""
    slate = ensure_connected(slate, plugin, sessions, member)
    if name not in sessions:
        return slate
    wrong = admit(sessions[name], todo, member)
    if isinstance(wrong, StageAbortedError):
        return drop(slate, name, "admission", wrong, sessions, member)
    sessions[name].mark_wrong(wrong)
    return slate.without_cells(name, wrong, member.topology.device_types) if wrong else slate


def ensure_connected(slate: Slate, plugin: Plugin, sessions: dict[str, Session], member: Membership) -> Slate:
    """Connect a backend that has no session yet: the slate that comes of it. Collective."""
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
    """Give up a backend that failed in a step: the slate without it. Collective.

    Returns once every rank has left the step and given back what it took. A wait of the plugin's own may hold a rank in
    it until its deadline; the next backend's time begins after that.
    """
    session = sessions.pop(name, None)
    if session is not None:
        session.release()
    step_name = f"{member.purpose}drop {name}"
    with contextlib.suppress(StageAbortedError), Stage(member.control, step_name, member.step_timeout_s) as stage:
        stage.barrier()
    return slate.without(name, f"{step}: {error.reason}" if step else error.reason, error.rank)


def _connect(plugin: Plugin, checks_operands: bool, member: Membership, budget: int) -> Session | StageAbortedError:
    """Run a plugin's `connect` on every rank and vote; what comes of it is the same kind on all of them."""
    channel = SessionChannel()
    context = dataclasses.replace(member.context, control=channel, memory_budget_nbytes=budget)
    hook = plugin.hooks.get("connect")
    session: Session | None = None
    try:
        with channel.open_stage(
            member.control, f"{member.purpose}connect {plugin.name}", member.step_timeout_s
        ) as stage:
            try:
                value: Any = context
                if hook is not None:
                    call = functools.partial(hook, member.topology, context)
                    on_late = functools.partial(close_value, plugin, orderly=False)
                    value = in_worker(call, member, f"connect of {plugin.name}", synchronize=False, on_late=on_late)
                if value is None:
                    raise TypeError("connect returned None, which is no session")
                session = Session(plugin, value, channel, checks_operands)
                check_budget(session.own_memory_nbytes, budget)
            except StageAbortedError:
                raise
            except Exception as error:  # the plugin border: its failure is a vote, not this rank's own end
                raise abort_stage(stage, member, error) from error
            session.count_memory(stage.all_gather(session.own_memory_nbytes, "vote"))
    except BaseException as error:
        if session is not None:
            session.close(orderly=False)
        if isinstance(error, StageAbortedError):
            return error
        raise
    return session
