"""`comm.pre_capture_init` for one group: the backends prepare what a capture would do lazily, then all plan anew."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

from comm_core._control.stage import Stage, StageAbortedError
from comm_core._group.connect import connect_and_admit, drop, ensure_connected
from comm_core._group.membership import Membership, abort_stage, check_budget, in_worker
from comm_core._group.negotiated import NegotiatedGroup
from comm_core._handle.session import Session
from comm_core._plan import decide
from comm_core.context import Shapes
from comm_core.errors import CommError, NegotiationError
from comm_core.types import Available, Range, Unavailable

__all__ = ["prepare", "step_name"]


def prepare(agreed: NegotiatedGroup, shapes: Shapes, number: int) -> NegotiatedGroup:
    """Prepare a group's backends for `shapes`, admit what they serve from then on, and plan. Collective.

    Args:
        agreed: the group so far; left as it is. Of its sessions that the new plan hasn't, those in use stay open.
        shapes: what the caller gave.
        number: which call of `comm.pre_capture_init` it is for the group, from 1; a call that fails on this rank before
            anything is sent counts, so that the ranks' numbers stay alike.

    Returns:
        The group from now on; `agreed` itself where it is prepared for these shapes already.

    Raises:
        NegotiationError: the ranks gave different shapes; on all ranks.
        StageAbortedError: a rank failed or didn't come.
    """
    context = agreed.member.context
    left_nbytes = max(context.memory_budget_nbytes - agreed.kept_nbytes, 0)
    context = dataclasses.replace(context, memory_budget_nbytes=left_nbytes)
    member = dataclasses.replace(agreed.member, purpose=step_name(number, ""), context=context)
    with Stage(member.control, step_name(number)) as stage:
        covered = any(_covers(earlier, shapes) for earlier in agreed.prepared)
        said = stage.all_gather([covered, shapes.max_tokens, shapes.hidden_size, str(shapes.dtype)])
    given = [item[1:] for item in said]
    if any(other != given[0] for other in given):
        raise NegotiationError(
            "comm.pre_capture_init's (max_tokens, hidden_size, dtype) differ between the ranks of this group: "
            f"{decide.describe_differences(given)}. Nothing was prepared. Give every rank the same"
        )
    if all(item[0] for item in said):  # one of them may have failed after it was prepared
        return agreed
    slate, sessions, asked = agreed.slate, dict(agreed.sessions), set[str]()
    try:
        while (name := _next_to_prepare(slate, sessions, agreed, asked)) is not None:
            asked.add(name)
            slate = ensure_connected(slate, agreed.plugins[name], sessions, member)
            if name in sessions:
                slate = _prepare_one(slate, name, shapes, sessions, member)
    except BaseException:
        for session in sessions.values():
            session.release()
        raise
    slate, sessions = connect_and_admit(slate, agreed.plugins, member, sessions)
    planned = NegotiatedGroup.of(slate, sessions, agreed.plugins, agreed.member)
    dropped_later = [session for name, session in agreed.sessions.items() if sessions.get(name) is not session]
    kept_nbytes = agreed.kept_nbytes + sum(session.memory_nbytes for session in dropped_later)
    return dataclasses.replace(planned, prepared=(*agreed.prepared, shapes), kept_nbytes=kept_nbytes)


def step_name(number: int, step: str = "shapes") -> str:
    """The name of the stage in which the ranks compare what they were given."""
    return f"prepare {number}: {step}"


def _covers(earlier: Shapes, shapes: Shapes) -> bool:
    """Whether what was prepared for `earlier` will do for `shapes`."""
    return dataclasses.replace(earlier, max_tokens=shapes.max_tokens) == shapes and (
        shapes.max_tokens <= earlier.max_tokens
    )


def _next_to_prepare(
    slate: decide.Slate, sessions: Mapping[str, Session], agreed: NegotiatedGroup, asked: Collection[str]
) -> str | None:
    """The backend to ask next, best first: one that is connected, or would own a route once it is prepared."""
    wanted = slate.owners_once_prepared(asked, agreed.topology.device_types) | sessions.keys()
    names = (offer.name for offer in slate.offers if offer.name in wanted - set(asked))
    return next((name for name in names if agreed.plugins[name].has("pre_capture_init")), None)


def _prepare_one(
    slate: decide.Slate, name: str, shapes: Shapes, sessions: dict[str, Session], member: Membership
) -> decide.Slate:
    """Run a backend's `pre_capture_init` on every rank, vote and merge; the slate that comes of it."""
    session, offer = sessions[name], slate.offer(name)
    others = sum(other.memory_nbytes for other in sessions.values() if other is not session)
    hook = functools.partial(session.plugin.hooks["pre_capture_init"], session.value, shapes)
    step = f"{member.purpose}pre_capture_init {name}"
    try:
        with session.channel.open_stage(member.control, step, member.step_timeout_s) as stage:
            try:
                ranges = in_worker(hook, member, f"pre_capture_init of {name}")
                memory_nbytes = session.own_memory_nbytes
                check_budget(memory_nbytes, member.context.memory_budget_nbytes - others)
                answer = None if ranges is None else _answer(ranges, offer.priority, session)
                votes = stage.all_gather([memory_nbytes, answer], "vote")
            except StageAbortedError:
                raise
            except Exception as error:  # the plugin border: its failure is a vote, not this rank's own end
                raise abort_stage(stage, member, error) from error
            unchanged = decide.encode_answer(Available(offer.priority, offer.ranges))
            merged = decide.merge([unchanged if answer is None else answer for _, answer in votes])
            if not isinstance(merged, Available):
                raise stage.abort(merged[0])
    except StageAbortedError as error:
        return drop(slate, name, "pre_capture_init", error, sessions, member)
    session.count_memory(nbytes for nbytes, _ in votes)
    if all(answer is None for _, answer in votes):
        return slate
    session.require_new_tests()
    return slate.narrowed(name, merged.ranges)


def _answer(ranges: Sequence[Range], priority: int, session: Session) -> dict[str, object]:
    """What a plugin returned, as the ranks exchange it.

    Raises:
        TypeError, ValueError, CommError: it can't be right.
    """
    if not ranges:
        raise ValueError("pre_capture_init returned no ranges: it serves nothing any more; None stands for unchanged")
    answer = decide.with_explicit_ranges(
        Available(priority, decide.once_prepared(ranges)), tuple(session.plugin.hooks), "pre_capture_init"
    )
    if isinstance(answer, Unavailable):
        raise CommError(answer.reason)
    return decide.encode_answer(answer)
