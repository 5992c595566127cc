"""The soak test itself, shortly; `make soak` runs it for minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import soak
from soak_ranks import Round

if TYPE_CHECKING:
    import pytest
    from harness import Ranks


def test_random_programs_are_right(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    (reports,) = soak.run(ranks, seed=3, seconds=0.0, round_s=2.0)
    assert len(reports) > 1
    assert sum(report.sums for report in reports) > 20
    assert "sums" in capsys.readouterr().out
    assert soak.growth([reports]) == []


def test_growth_is_found() -> None:
    flat = [Round(1, settled={"threads": 3}, held={"threads": 3}, resident_kib=kib) for kib in (100, 90_000, 99_000)]
    assert soak.growth([[report] for report in flat]) == []
    leaking = Round(1, settled={"threads": 3}, held={"threads": 4}, resident_kib=200_000)
    assert soak.growth([[*flat, leaking]]) == [
        "process 1: 1 more threads in round 0",
        "process 1: 98 MiB more memory in the last 2 rounds",
    ]
