"""A part of the fault matrix; `make faults` runs all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fault_matrix
import pytest
from faulty_plugins import install_kind
from matrix_plugins import FAULTS, NAME, STAGES, Faulty, applies

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks

# Faults that share their processes. Only where a peer waits by its own means does a cell wait for the deadline.
QUICK = ("SystemExit", "KeyboardInterrupt", "wrong data", "wrong type or shape")
# Both are errors that a hook raises: one a stage.
RAISED = ("raise", "out of memory")
# The deadline of every wait, in seconds.
TIMEOUT_S = 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_ends_alike_on_all_ranks_and_leaves_nothing(ranks: Ranks, tmp_path: Path, stage: str) -> None:
    path = install_kind(tmp_path / "plugin", Faulty, NAME, 300)  # type: ignore[arg-type]
    number = STAGES.index(stage)
    faults = [fault for fault in (RAISED[number // 2 % 2], *QUICK) if applies(stage, fault)]
    cells = fault_matrix.run(ranks, path, stage, faults, 2, number % 2, TIMEOUT_S)
    assert len(cells) == len(faults) > 2
    assert [f"{cell.label}: {problem}" for cell in cells for problem in fault_matrix.problems(cell)] == []


def test_the_page_has_every_cell() -> None:
    rows = fault_matrix.rows_of_page()
    assert set(rows) == {(stage, fault) for stage in STAGES for fault in FAULTS if applies(stage, fault)}
    assert fault_matrix.PAGE.read_text("utf-8") == fault_matrix.page(rows)
