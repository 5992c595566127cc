"""Run functions of a test in real processes; see comm_core._testing.ranks."""

from __future__ import annotations

from comm_core._testing.rank_process import side_store
from comm_core._testing.ranks import DEAD, RankError, Ranks, install

__all__ = ["DEAD", "RankError", "Ranks", "install", "side_store"]
