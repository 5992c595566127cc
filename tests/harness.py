"""Run functions of a test in real processes; see comm_core._testing.ranks."""

from __future__ import annotations

from pathlib import Path

from comm_core._testing.rank_process import side_store
from comm_core._testing.ranks import DEAD, RankError, Ranks, install

__all__ = ["DEAD", "RankError", "Ranks", "install", "install_entry_point", "side_store"]


def install_entry_point(folder: Path, entry: str, name: str) -> Path:
    """Write into `folder` that the module `entry` is the backend `name`; for names that an installed module has."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[comm_core.backends]\n{name} = {entry}\n")
    return folder
