"""The admission test of one session on every rank, and the ranks' vote on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from comm_core._control.stage import StageAbortedError
from comm_core._control.steps import Steps
from comm_core._group.admission import run_cases
from comm_core._group.failures import Failures
from comm_core._group.step import Step
from comm_core._handle.session import Session
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell, cells
from comm_core.errors import NegotiationError

__all__ = ["admit"]


def admit(
    session: Session, cases: list[AdmissionCase], step: Step, *, ordered: bool = False
) -> dict[Cell, tuple[str, int | None]] | StageAbortedError:
    """Test the cases on every rank; `ordered`: see `run_cases`. Collective.

    Returns:
        For each kind of message that failed on any rank, the reason and the rank: the first where it failed before any
        time-out, else the first of all. The error if a rank aborted the test.
    """
    member = step.member
    tested_before = len(session.tested)
    session.mark_tested(cases)
    context = member.context
    numbers = {cell: number for number, cell in enumerate(cells(member.topology.device_types))}
    failures = Failures()
    unreadable: list[NegotiationError] = []

    def gather(recorded: list[int]) -> list[tuple[int, ...]]:
        values = stage.all_gather(recorded)
        try:
            return member.read_recorded(values)
        except NegotiationError as error:
            unreadable.append(error)
            raise

    try:
        name = f"{member.stage_prefix}admit {session.plugin.name} {tested_before}"
        with session.channel.open_stage(member.control, name, step.left_s) as stage:
            steps = Steps(member.control, name, stage, member.connect_timeout_s)
            test = functools.partial(
                run_cases,
                session.plugin.hooks,
                session.value,
                cases,
                rank=context.rank,
                world_size=context.world_size,
                device=context.device,
                all_gather=gather,
                end_step=steps.end,
                failures=failures,
                ordered=ordered,
            )
            try:
                try:
                    step.run(test, f"the admission test of {session.plugin.name}")
                finally:
                    steps.finish()
                late = failures.after_timeout
                vote = {numbers[cell]: [cell in late, reason] for cell, reason in failures.items()}
                votes = stage.all_gather(vote, "vote")
            except StageAbortedError:
                step.failure = failures.cause
                raise
            except Exception as error:  # plugin boundary: its failure aborts the stage on all ranks
                if error in unreadable:  # not the plugin's
                    raise
                step.failure = failures.cause
                raise step.abort(stage, error) from error
    except StageAbortedError as error:
        return error
    return _first_failures(member.read_failures(votes), numbers)


def _first_failures(
    votes: Sequence[Mapping[str, tuple[bool, str]]], numbers: Mapping[Cell, int]
) -> dict[Cell, tuple[str, int | None]]:
    """Return for each kind of message that failed on any rank the reason and the rank; see `admit`."""
    failed: dict[Cell, tuple[str, int | None]] = {}
    for cell, number in numbers.items():
        found = [(*vote[str(number)], rank) for rank, vote in enumerate(votes) if str(number) in vote]
        if found:
            _, reason, rank = min(found, key=lambda item: (item[0], item[2]))
            failed[cell] = (reason, rank)
    return failed
