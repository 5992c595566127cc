"""`comm.pre_capture_init` for one group: the backends prepare what a capture would do lazily, then all plan anew."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from comm_core._control.stage import Stage, StageAbortedError
from comm_core._group.connect import Member, check_budget, connected, dropped, establish, failed_in, in_worker
from comm_core._group.negotiation import Agreed
from comm_core._handle.session import Session
from comm_core._plan import decide
from comm_core._plan.decide import Slate
from comm_core._plan.routes import owners, plan
from comm_core._plugins.discovery import Plugin
from comm_core.context import Shapes
from comm_core.errors import CommError, NegotiationError
from comm_core.types import DTYPES, Available, Range, Unavailable

if TYPE_CHECKING:
    import torch

__all__ = ["checked", "first_step", "prepare"]


def checked(max_tokens: int, hidden_size: int, dtype: torch.dtype) -> Shapes:
    """The arguments of `comm.pre_capture_init`.

    Raises:
        TypeError, ValueError: what no call could have.
    """
    for name, value in (("max_tokens", max_tokens), ("hidden_size", hidden_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: a number of at least 1 is needed")
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"dtype={dtype!r}: one of {', '.join(DTYPES)} is needed, as a torch dtype")
    return Shapes(max_tokens, hidden_size, dtype)


def prepare(agreed: Agreed, shapes: Shapes, number: int) -> Agreed:
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
    member = dataclasses.replace(agreed.member, purpose=first_step(number, ""), context=context)
    with Stage(member.control, first_step(number)) as stage:
        covered = any(_covers(earlier, shapes) for earlier in agreed.prepared)
        said = stage.all_gather([covered, shapes.max_tokens, shapes.hidden_size, str(shapes.dtype)])
    given = [item[1:] for item in said]
    if any(other != given[0] for other in given):
        raise NegotiationError(
            "comm.pre_capture_init's (max_tokens, hidden_size, dtype) differ between the ranks of this group: "
            f"{decide.differences(given)}. Nothing was prepared. Give every rank the same"
        )
    if all(item[0] for item in said):  # one of them may have failed after it was prepared
        return agreed
    slate, sessions, asked = agreed.slate, dict(agreed.sessions), set[str]()
    try:
        while (plugin := _next_to_prepare(slate, sessions, agreed, asked)) is not None:
            asked.add(plugin.name)
            slate = connected(slate, plugin, sessions, member)
            if plugin.name in sessions:
                slate = _prepare_one(slate, plugin, shapes, sessions, member)
    except BaseException:
        for session in sessions.values():
            session.release()
        raise
    slate, sessions = establish(slate, agreed.plugins, member, sessions)
    planned = Agreed.of(slate, sessions, agreed.plugins, agreed.member)
    dropped_later = [session for name, session in agreed.sessions.items() if sessions.get(name) is not session]
    kept_nbytes = agreed.kept_nbytes + sum(session.memory_nbytes for session in dropped_later)
    return dataclasses.replace(planned, prepared=(*agreed.prepared, shapes), kept_nbytes=kept_nbytes)


def first_step(number: int, step: str = "shapes") -> str:
    """The name of the stage in which the ranks compare what they were given."""
    return f"prepare {number}: {step}"


def _covers(earlier: Shapes, shapes: Shapes) -> bool:
    """Whether what was prepared for `earlier` will do for `shapes`."""
    return dataclasses.replace(earlier, max_tokens=shapes.max_tokens) == shapes and (
        shapes.max_tokens <= earlier.max_tokens
    )


def _next_to_prepare(
    slate: Slate, sessions: Mapping[str, Session], agreed: Agreed, asked: Collection[str]
) -> Plugin | None:
    """The plugin to ask next, best first: one that is connected, or could own a route once it is prepared.

    What those before serve by now is known, of the others what they hope for.
    """
    hopeful = tuple(
        offer if offer.name in asked else dataclasses.replace(offer, ranges=_served(offer.ranges))
        for offer in slate.offers
    )
    wanted = owners(plan(hopeful, agreed.topology.device_types)) | sessions.keys()
    plugins = (agreed.plugins[offer.name] for offer in slate.offers if offer.name in wanted - set(asked))
    return next((plugin for plugin in plugins if plugin.has("pre_capture_init")), None)


def _prepare_one(slate: Slate, plugin: Plugin, shapes: Shapes, sessions: dict[str, Session], member: Member) -> Slate:
    """Run a plugin's `pre_capture_init` on every rank, vote and merge; the slate that comes of it."""
    name, session = plugin.name, sessions[plugin.name]
    offer = slate.offer(name)
    others = sum(other.memory_nbytes for other in sessions.values() if other is not session)
    hook = functools.partial(plugin.hooks["pre_capture_init"], session.value, shapes)
    step = f"{member.purpose}pre_capture_init {name}"
    try:
        with session.channel.opened(member.control, step, member.step_timeout_s) as stage:
            try:
                ranges = in_worker(hook, member, f"pre_capture_init of {name}")
                memory_nbytes = session.own_memory_nbytes
                check_budget(memory_nbytes, member.context.memory_budget_nbytes - others)
                answer = None if ranges is None else _answer(ranges, offer.priority, plugin)
                votes = stage.all_gather([memory_nbytes, answer], "vote")
            except StageAbortedError:
                raise
            except Exception as error:  # the plugin border: its failure is a vote, not this rank's own end
                raise failed_in(stage, member, error) from error
            unchanged = decide.encode_answer(Available(offer.priority, offer.ranges))
            merged = decide.merge([unchanged if answer is None else answer for _, answer in votes])
            if not isinstance(merged, Available):
                raise stage.abort(merged[0])
    except StageAbortedError as error:
        return dropped(slate, name, "pre_capture_init", error, sessions, member)
    session.count_memory(nbytes for nbytes, _ in votes)
    if all(answer is None for _, answer in votes):
        return slate
    session.require_new_tests()
    return slate.narrowed(name, merged.ranges)


def _answer(ranges: Sequence[Range], priority: int, plugin: Plugin) -> dict[str, object]:
    """What a plugin returned, as the ranks exchange it.

    Raises:
        TypeError, ValueError, CommError: it can't be right.
    """
    if not ranges:
        raise ValueError("pre_capture_init returned no ranges: it serves nothing any more; None stands for unchanged")
    answer = decide.implied(Available(priority, _served(ranges)), tuple(plugin.hooks), "pre_capture_init")
    if isinstance(answer, Unavailable):
        raise CommError(answer.reason)
    return decide.encode_answer(answer)


def _served(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The ranges, none of them waiting to be prepared."""
    return tuple(dataclasses.replace(item, prepared=False) for item in ranges)
