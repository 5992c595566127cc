"""Connect and admit the candidates of a group, in order, until every route has an owner that was seen to work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import describe, run_with_deadline
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._control.store import Control
from comm_core._group import admission
from comm_core._handle.session import Session, close_value
from comm_core._plan.cases import AdmissionCase, admission_cases
from comm_core._plan.decide import Slate
from comm_core._plan.routes import Cell, cells, narrow, owned_cells, owners, plan
from comm_core._plugins.discovery import Plugin
from comm_core.context import GroupContext
from comm_core.topology import Topology
from comm_core.types import Route

__all__ = ["Member", "check_budget", "connected", "dropped", "establish", "failed_in", "in_worker", "words"]

_log = logging.getLogger("comm_core")
# How much longer than a step's own deadline its vote waits, in seconds: whoever ran out of time says so himself, and
# the others hear his words rather than conclude that he is gone.
_VOTE_GRACE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Member:
    """This rank's place in a group that negotiates.

    Attributes:
        context: what plugins are given, but for `control` and `memory_budget_nbytes`.
        topology: the group.
        control: the group's control channel.
        connect_timeout_s: for each candidate's `connect`, and again for its admission test, in seconds.
        purpose: what the names of its steps begin with; another each time that the group plans.
    """

    context: GroupContext
    topology: Topology
    control: Control
    connect_timeout_s: float
    purpose: str = ""

    @property
    def step_timeout_s(self) -> float:
        """For one step and its vote, in seconds."""
        return self.connect_timeout_s + _VOTE_GRACE_S


def establish(
    slate: Slate, plugins: Mapping[str, Plugin], member: Member, before: Mapping[str, Session] | None = None
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
            routes = plan(slate.offers, member.topology.device_types)
            for idle in sessions.keys() - owners(routes):
                # Whoever was admitted since takes all that it had.
                if not sessions[idle].in_use:
                    sessions.pop(idle).close(orderly=False)
            name, todo = _next(slate, routes, sessions)
            if name is None:
                return slate, sessions
            slate = _try(slate, routes, name, todo, plugins[name], sessions, member)
    except BaseException:
        for session in sessions.values():
            session.release()
        raise


def _try(
    slate: Slate,
    routes: tuple[Route, ...],
    name: str,
    todo: list[AdmissionCase],
    plugin: Plugin,
    sessions: dict[str, Session],
    member: Member,
) -> Slate:
    """Connect a backend where it isn't yet and put it through its cases; the slate that comes of it."""
    device_types = member.topology.device_types
    untested = owned_cells(routes, name) - {case.cell for case in admission_cases(routes, name)}
    if untested:
        return _drop_wrong(slate, name, dict.fromkeys(untested, ("no size of it can be tested", None)), device_types)
    slate = connected(slate, plugin, sessions, member)
    if name not in sessions:
        return slate
    wrong = _admit(sessions[name], todo, member)
    if isinstance(wrong, StageAbortedError):
        return dropped(slate, name, "admission", wrong, sessions, member)
    sessions[name].mark_wrong(wrong)
    return _drop_wrong(slate, name, wrong, device_types) if wrong else slate


def connected(slate: Slate, plugin: Plugin, sessions: dict[str, Session], member: Member) -> Slate:
    """Connect a backend that has no session yet: the slate that comes of it. Collective."""
    if plugin.name in sessions:
        return slate
    budget = member.context.memory_budget_nbytes - sum(session.memory_nbytes for session in sessions.values())
    outcome = _connect(plugin, slate.offer(plugin.name).checks_operands, member, budget)
    if isinstance(outcome, StageAbortedError):
        return dropped(slate, plugin.name, "", outcome, sessions, member)
    sessions[plugin.name] = outcome
    return slate


def dropped(
    slate: Slate, name: str, step: str, error: StageAbortedError, sessions: dict[str, Session], member: Member
) -> Slate:
    """Give up a backend that failed in a step: the slate without it. Collective.

    Returns once every rank has left the step and given back what it took. A wait of the plugin's own may hold a rank in
    it until its deadline; the next backend's time begins after that.
    """
    session = sessions.pop(name, None)
    if session is not None:
        session.release()
    drop = f"{member.purpose}drop {name}"
    with contextlib.suppress(StageAbortedError), Stage(member.control, drop, member.step_timeout_s) as stage:
        stage.barrier()
    return slate.without(name, f"{step}: {error.reason}" if step else error.reason, error.rank)


def _next(
    slate: Slate, routes: tuple[Route, ...], sessions: dict[str, Session]
) -> tuple[str | None, list[AdmissionCase]]:
    """Who is to be connected or tested next, and with what; None where everybody was."""
    owning = owners(routes)
    for name in (offer.name for offer in slate.offers if offer.name in owning):
        tested = sessions[name].tested if name in sessions else set()
        todo = [case for case in admission_cases(routes, name) if case not in tested]
        if todo or name not in sessions:
            return name, todo
    return None, []


def _connect(plugin: Plugin, checks_operands: bool, member: Member, budget: int) -> Session | StageAbortedError:
    """Run a plugin's `connect` on every rank and vote; what comes of it is the same kind on all of them."""
    channel = SessionChannel()
    context = dataclasses.replace(member.context, control=channel, memory_budget_nbytes=budget)
    hook = plugin.hooks.get("connect")
    session: Session | None = None
    try:
        with channel.opened(member.control, f"{member.purpose}connect {plugin.name}", member.step_timeout_s) as stage:
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
                raise failed_in(stage, member, error) from error
            session.count_memory(stage.all_gather(session.own_memory_nbytes, "vote"))
    except BaseException as error:
        if session is not None:
            session.close(orderly=False)
        if isinstance(error, StageAbortedError):
            return error
        raise
    return session


def _admit(
    session: Session, todo: list[AdmissionCase], member: Member
) -> dict[Cell, tuple[str, int | None]] | StageAbortedError:
    """Test the cases on every rank; the kinds of message that failed anywhere, with the reason and the rank."""
    count = len(session.tested)
    session.mark_tested(todo)
    context = member.context
    numbers = {cell: number for number, cell in enumerate(cells(member.topology.device_types))}
    try:
        step = f"{member.purpose}admit {session.plugin.name} {count}"
        with session.channel.opened(member.control, step, member.step_timeout_s) as stage:
            test = functools.partial(
                admission.run,
                session.plugin.hooks,
                session.value,
                todo,
                rank=context.rank,
                world_size=context.world_size,
                device=context.device,
                all_gather=stage.all_gather,
            )
            try:
                wrong = in_worker(test, member, f"the admission test of {session.plugin.name}")
                votes = stage.all_gather({numbers[cell]: reason for cell, reason in wrong.items()}, "vote")
            except StageAbortedError:
                raise
            except Exception as error:  # the plugin border, as in `_connect`
                raise failed_in(stage, member, error) from error
    except StageAbortedError as error:
        return error
    failed: dict[Cell, tuple[str, int | None]] = {}
    for cell, number in numbers.items():
        for rank, vote in enumerate(votes):
            if str(number) in vote:
                failed.setdefault(cell, (vote[str(number)], rank))
    return failed


def _drop_wrong(
    slate: Slate, name: str, wrong: dict[Cell, tuple[str, int | None]], device_types: tuple[str, ...]
) -> Slate:
    """The slate without the kinds of message that a backend failed; without the backend, where none is left."""
    offer = next(offer for offer in slate.offers if offer.name == name)
    ranges = narrow(offer.ranges, set(wrong), device_types)
    if any(not item.prepared for item in ranges):
        return slate.narrowed(name, ranges)
    reason, rank = next(iter(wrong.values()))
    return slate.without(name, f"admission: {reason}", rank)


def check_budget(memory_nbytes: int, budget: int) -> None:
    """Raise where a session took more device memory than it may, in bytes."""
    if not 0 <= memory_nbytes <= budget:
        raise MemoryError(f"it took {memory_nbytes} bytes of a budget of {budget}")


def in_worker(
    call: Callable[[], Any],
    member: Member,
    name: str,
    *,
    synchronize: bool = True,
    on_late: Callable[[Any], object] | None = None,
) -> Any:
    """Call a function that may hang in a thread with the group's device and the caller's stream, under a deadline.

    Args:
        call: its result is returned.
        member: gives the device and the deadline.
        name: names the call in errors.
        synchronize: whether to wait until the stream has finished what `call` queued.
        on_late: is given the result if that comes after the deadline.
    """
    device = member.context.device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> Any:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            value = call()
            if stream is not None and synchronize:
                stream.synchronize()
            return value

    return run_with_deadline(work, member.connect_timeout_s, name=name, on_late=on_late)


def words(error: BaseException) -> str:
    """Why a step failed, for the other ranks."""
    return str(error) if isinstance(error, TimeoutError) else describe(error)


def failed_in(stage: Stage, member: Member, error: Exception) -> StageAbortedError:
    """Abort a step in which a plugin failed; a hook that is late since it waits for other ranks says for which."""
    awaited = stage.awaited() if isinstance(error, TimeoutError) else ()
    waits = f": it waits for {member.control.label(*awaited)}" if awaited else ""
    return stage.abort(words(error) + waits)
