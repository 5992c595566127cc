"""Puts a session through admission cases on every rank, and gathers what failed."""

from __future__ import annotations

import functools

from comm_core._control.stage import StageAbortedError
from comm_core._group import admission
from comm_core._group.membership import Membership, abort_stage, in_worker
from comm_core._handle.session import Session
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell, cells

__all__ = ["admit"]


def admit(
    session: Session, todo: list[AdmissionCase], member: Membership
) -> dict[Cell, tuple[str, int | None]] | StageAbortedError:
    """Test the cases on every rank; the kinds of message that failed anywhere, with the reason and the rank."""
    count = len(session.tested)
    session.mark_tested(todo)
    context = member.context
    numbers = {cell: number for number, cell in enumerate(cells(member.topology.device_types))}
    try:
        step = f"{member.purpose}admit {session.plugin.name} {count}"
        with session.channel.open_stage(member.control, step, member.step_timeout_s) as stage:
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
                raise abort_stage(stage, member, error) from error
    except StageAbortedError as error:
        return error
    failed: dict[Cell, tuple[str, int | None]] = {}
    for cell, number in numbers.items():
        for rank, vote in enumerate(votes):
            if str(number) in vote:
                failed.setdefault(cell, (vote[str(number)], rank))
    return failed
