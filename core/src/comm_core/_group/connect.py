"""Connect and admit a group's candidates, in order, until every route has an owner that passed its admission."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from comm_core._control.channel import SessionChannel
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._group.admit import admit
from comm_core._group.membership import Membership
from comm_core._group.step import Step, check_budget
from comm_core._handle.session import Session, close_all, close_value
from comm_core._plan.cases import AdmissionCase, next_to_test, untestable_cells
from comm_core._plan.decide import Slate
from comm_core._plugins.discovery import Plugin

__all__ = ["connect_and_admit", "drop", "ensure_connected", "read_memory", "release_all"]


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

    Raises:
        StageAbortedError: a rank left or vanished, and no rank can go on; its sessions that aren't in use are closed.
    """
    sessions = dict(before or {})
    try:
        while True:
            routes = slate.routes(member.topology.device_types)
            # Candidates admitted since then own all their routes.
            owners = {rule.backend for route in routes for rule in route.rules}
            idle = sorted(name for name in sessions.keys() - owners if not sessions[name].in_use)
            close_all([sessions.pop(name) for name in idle], timeout_s=member.close_timeout_s)
            tested = {name: session.tested for name, session in sessions.items()}
            name, cases = next_to_test(slate.offers, routes, tested)
            if name is None:
                # A rank that leaves or vanishes until here takes the others with it.
                with Stage(member.control, f"{member.stage_prefix}done") as stage:
                    stage.barrier()
                return slate, sessions
            untestable = untestable_cells(routes, name)
            if untestable:
                failures = dict.fromkeys(untestable, ("the admission test can't test any of its sizes", None))
                slate = slate.without_cells(name, failures, member.topology.device_types)
            else:
                slate = _connect_and_test(slate, name, cases, plugins[name], sessions, member)
    except BaseException:
        release_all(sessions.values(), member)
        raise


def release_all(sessions: Iterable[Session], member: Membership) -> None:
    """Close the sessions that aren't in use, after a failure."""
    unused = [session for session in sessions if not session.in_use]
    for session in unused:
        session.abort_own_group()
    close_all(unused, timeout_s=member.close_timeout_s)


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
    step = Step(member)
    failures = admit(sessions[name], cases, step, ordered=slate.deterministic)
    if isinstance(failures, StageAbortedError):
        return drop(slate, name, "admission", failures, sessions, step)
    sessions[name].mark_failed(failures)
    return slate.without_cells(name, failures, member.topology.device_types) if failures else slate


def ensure_connected(slate: Slate, plugin: Plugin, sessions: dict[str, Session], member: Membership) -> Slate:
    """Connect a backend, if it has no session yet; return the new slate. Collective."""
    if plugin.name in sessions:
        return slate
    budget = member.context.memory_budget_nbytes - sum(session.memory_nbytes for session in sessions.values())
    step = Step(member)
    outcome = _connect(plugin, slate, step, budget)
    if isinstance(outcome, StageAbortedError):
        return drop(slate, plugin.name, "", outcome, sessions, step)
    sessions[plugin.name] = outcome
    return slate


def drop(
    slate: Slate, name: str, kind: str, error: StageAbortedError, sessions: dict[str, Session], step: Step
) -> Slate:
    """Drop a backend that failed in a step; return the slate without it. Collective.

    Returns once every rank has left the step and released the session. The next backend's deadline starts after that.

    Args:
        slate: the candidates.
        name: the backend.
        kind: the step's name in the reason; "" for none.
        error: the abort of the step's stage.
        sessions: the sessions by name; loses the backend's.
        step: the step.

    Raises:
        StageAbortedError: a rank left or vanished, and no rank can go on.
    """
    session, member = sessions.pop(name, None), step.member
    if session is not None:
        release_all([session], member)
    reason, rank = step.find_cause(error, f"{member.stage_prefix}drop {name}")
    return slate.without(name, f"{kind}: {reason}" if kind else reason, rank)


def _connect(plugin: Plugin, slate: Slate, step: Step, budget: int) -> Session | StageAbortedError:
    """Run a plugin's `connect`, and `use_variants` if the tuned table has choices for it, on every rank and vote.

    Either every rank gets a session, or every rank an error.
    """
    member, channel = step.member, SessionChannel()
    own_group = member.own_group(plugin.name)
    context = dataclasses.replace(
        member.context,
        group=own_group.get,  # type: ignore[arg-type]  # each read calls it
        control=channel,
        memory_budget_nbytes=budget,
    )
    hook = plugin.hooks.get("connect")
    choices = slate.tuning.variants.get(plugin.name, ())
    session: Session | None = None
    try:
        stage_name = f"{member.stage_prefix}connect {plugin.name}"
        with channel.open_stage(member.control, stage_name, step.left_s) as stage:
            try:
                value: Any = context
                if hook is not None:
                    # A copy of its own, as for `is_available`.
                    call = functools.partial(hook, copy.deepcopy(member.topology), context)
                    on_late = functools.partial(close_value, plugin, orderly=False)
                    value = step.run(call, f"connect of {plugin.name}", synchronize=False, on_late=on_late)
                if value is None:
                    raise TypeError("connect returned None, not a session")
                session = Session(
                    plugin,
                    value,
                    channel,
                    slate.offer(plugin.name).checks_operands,
                    own_group=own_group,
                    device=context.device,
                    timeout_s=context.wait_timeout_s,
                )
                memory_nbytes = read_memory(session, step, budget)
                if choices and plugin.has("use_variants"):
                    call = functools.partial(plugin.hooks["use_variants"], value, choices)
                    step.run(call, f"use_variants of {plugin.name}")
            except StageAbortedError:
                raise
            except Exception as error:  # plugin boundary: its failure aborts the stage on all ranks
                raise step.abort(stage, error) from error
            votes = stage.all_gather(memory_nbytes, "vote")
            session.count_memory(member.read_memory(votes))
    except BaseException as error:
        # First, as in `release_all`. A hook that still runs, or that returned its session too late, loses it too.
        own_group.close(tell_peers=True)
        if session is not None:
            release_all([session], member)
        if isinstance(error, StageAbortedError):
            return error
        raise
    return session


def read_memory(session: Session, step: Step, budget: int) -> int:
    """Return the memory in bytes that a session reports for this rank.

    Raises:
        MemoryError: it is more than `budget`.
        Exception: the plugin's property raised it or hasn't returned in time.
    """
    memory_nbytes = 0
    if session.plugin.has("connect"):
        name = f"memory_nbytes of {session.plugin.name}"
        memory_nbytes = step.run(lambda: session.reported_memory_nbytes, name, synchronize=False)
    check_budget(memory_nbytes, budget)
    return memory_nbytes
