"""`comm.pre_capture_init` for one group: backends prepare for captures, then the ranks replan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping

from comm_core._control.stage import Stage, StageAbortedError
from comm_core._group.connect import connect_and_admit, drop, ensure_connected, read_memory, release_all
from comm_core._group.membership import Membership
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._group.step import Step
from comm_core._handle.session import Session
from comm_core._plan import decide
from comm_core.context import Shapes
from comm_core.errors import NegotiationError

__all__ = ["is_prepared", "prepare", "stage_name"]


def is_prepared(negotiated: NegotiatedGroup, shapes: Shapes, number: int) -> bool:
    """Return whether the group is already prepared for `shapes` on all ranks. Collective.

    Args:
        negotiated: the outcome so far.
        shapes: the caller's arguments.
        number: the number of this call of `comm.pre_capture_init` for the group, from 1. A call that fails on this rank
            before anything is sent counts too, so that the ranks' numbers stay equal.

    Raises:
        NegotiationError: the ranks passed different shapes; on all ranks.
        StageAbortedError: a rank failed or didn't arrive in time.
    """
    with Stage(negotiated.member.control, stage_name(number)) as stage:
        covered = any(_covers(earlier, shapes) for earlier in negotiated.prepared)
        gathered = stage.all_gather([covered, shapes.max_tokens, shapes.hidden_size, str(shapes.dtype)])
    calls = negotiated.member.read_shapes(gathered)
    passed = [arguments for _, arguments in calls]
    if any(other != passed[0] for other in passed):
        raise NegotiationError(
            "the arguments (max_tokens, hidden_size, dtype) of comm.pre_capture_init differ between the ranks: "
            f"{decide.describe_differences(passed)}. Nothing was prepared. Pass the same arguments on every rank"
        )
    # An earlier call may have failed on some ranks after others were prepared.
    return all(is_covered for is_covered, _ in calls)


def prepare(negotiated: NegotiatedGroup, shapes: Shapes, number: int) -> NegotiatedGroup:
    """Prepare a group's backends for `shapes`, admit the ranges that they now serve, and replan. Collective.

    Args:
        negotiated: the outcome so far; unchanged. Its sessions in use stay open, even if the new plan lacks them.
        shapes: the caller's arguments, equal on all ranks.
        number: the number of this call; see `is_prepared`.

    Returns:
        The new outcome.

    Raises:
        StageAbortedError: a rank left or vanished. Some backends may be prepared by then, and no rank can go on.
    """
    context = negotiated.member.context
    left_nbytes = max(context.memory_budget_nbytes - negotiated.kept_nbytes, 0)
    context = dataclasses.replace(context, memory_budget_nbytes=left_nbytes)
    member = dataclasses.replace(negotiated.member, stage_prefix=stage_name(number, ""), context=context)
    slate, sessions, asked = negotiated.slate, dict(negotiated.sessions), set[str]()
    try:
        while (name := _next_to_prepare(slate, sessions, negotiated, asked)) is not None:
            asked.add(name)
            slate = ensure_connected(slate, negotiated.plugins[name], sessions, member)
            if name in sessions:
                slate = _prepare_one(slate, name, shapes, sessions, member)
    except BaseException:
        release_all(sessions.values(), member)
        raise
    slate, sessions = connect_and_admit(slate, negotiated.plugins, member, sessions)
    planned = NegotiatedGroup.of(slate, negotiated.asked_slate, sessions, negotiated.plugins, negotiated.member)
    dropped_later = [session for name, session in negotiated.sessions.items() if sessions.get(name) is not session]
    kept_nbytes = negotiated.kept_nbytes + sum(session.memory_nbytes for session in dropped_later)
    return dataclasses.replace(planned, prepared=(*negotiated.prepared, shapes), kept_nbytes=kept_nbytes)


def stage_name(number: int, step: str = "shapes") -> str:
    """Return the name of a stage of the preparation; by default of the one that compares the ranks' arguments."""
    return f"prepare {number}: {step}"


def _covers(earlier: Shapes, shapes: Shapes) -> bool:
    """Return whether a preparation for `earlier` covers `shapes`."""
    return dataclasses.replace(earlier, max_tokens=shapes.max_tokens) == shapes and (
        shapes.max_tokens <= earlier.max_tokens
    )


def _next_to_prepare(
    slate: decide.Slate, sessions: Mapping[str, Session], negotiated: NegotiatedGroup, asked: Collection[str]
) -> str | None:
    """Return the next backend to prepare, best first: one that is connected, or would own a route once prepared."""
    wanted = slate.owners_once_prepared(asked, negotiated.topology.device_types) | sessions.keys()
    names = (offer.name for offer in slate.offers if offer.name in wanted - set(asked))
    return next((name for name in names if negotiated.plugins[name].has("pre_capture_init")), None)


def _prepare_one(
    slate: decide.Slate, name: str, shapes: Shapes, sessions: dict[str, Session], member: Membership
) -> decide.Slate:
    """Run a backend's `pre_capture_init` on every rank, vote, merge the ranges and return the new slate."""
    session, offer, step = sessions[name], slate.offer(name), Step(member)
    others_nbytes = sum(other.memory_nbytes for other in sessions.values() if other is not session)
    hook = functools.partial(session.plugin.hooks["pre_capture_init"], session.value, shapes)
    vote_name = f"{member.stage_prefix}pre_capture_init {name}"
    try:
        with session.channel.open_stage(member.control, vote_name, step.left_s) as stage:
            try:
                ranges = step.run(hook, f"pre_capture_init of {name}")
                memory_nbytes = read_memory(session, step, member.context.memory_budget_nbytes - others_nbytes)
                hooks = tuple(session.plugin.hooks)
                answer = None if ranges is None else decide.encode_prepared(ranges, offer.priority, hooks)
                gathered = stage.all_gather([memory_nbytes, answer], "vote")
            except StageAbortedError:
                raise
            except Exception as error:  # plugin boundary: its failure aborts the stage on all ranks
                raise step.abort(stage, error) from error
            votes = member.read_prepared(gathered)
            merged = decide.merge_prepared(offer, [answer for _, answer in votes])
            if isinstance(merged, tuple):
                raise stage.abort(merged[0])
    except StageAbortedError as error:
        return drop(slate, name, "pre_capture_init", error, sessions, step)
    session.count_memory(nbytes for nbytes, _ in votes)
    if all(answer is None for _, answer in votes):
        return slate
    session.reset_admission()
    return slate.with_prepared_ranges(name, merged.ranges)
