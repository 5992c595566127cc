"""Run a session's admission cases on every rank and gather the failures."""

from __future__ import annotations

import functools

from comm_core._control.stage import StageAbortedError
from comm_core._group import admission
from comm_core._group.membership import Membership, abort_stage, run_in_worker
from comm_core._handle.session import Session
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell, cells

__all__ = ["admit"]


def admit(
    session: Session, cases: list[AdmissionCase], member: Membership
) -> dict[Cell, tuple[str, int | None]] | StageAbortedError:
    """Test the cases on every rank. Collective.

    Returns:
        For each kind of message that failed on any rank, the reason and the rank; the error if a rank aborted the test.
    """
    tested_before = len(session.tested)
    session.mark_tested(cases)
    context = member.context
    numbers = {cell: number for number, cell in enumerate(cells(member.topology.device_types))}
    try:
        name = f"{member.stage_prefix}admit {session.plugin.name} {tested_before}"
        with session.channel.open_stage(member.control, name, member.stage_timeout_s) as stage:
            test = functools.partial(
                admission.run,
                session.plugin.hooks,
                session.value,
                cases,
                rank=context.rank,
                world_size=context.world_size,
                device=context.device,
                all_gather=stage.all_gather,
            )
            try:
                failures = run_in_worker(test, member, f"the admission test of {session.plugin.name}")
                votes = stage.all_gather({numbers[cell]: reason for cell, reason in failures.items()}, "vote")
            except StageAbortedError:
                raise
            except Exception as error:  # plugin boundary: its failure aborts the stage on all ranks
                raise abort_stage(stage, member, error) from error
    except StageAbortedError as error:
        return error
    failed: dict[Cell, tuple[str, int | None]] = {}
    for cell, number in numbers.items():
        for rank, vote in enumerate(votes):
            if str(number) in vote:
                failed.setdefault(cell, (vote[str(number)], rank))
    return failed
