"""What the packaging tests share: where the checkout is, and how to look into a wheel."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path

ROOT = Path(__file__).parents[2]

Pip = Callable[..., str]
BuildWheel = Callable[[Path], Path]


def read_metadata(wheel: Path) -> PathDistribution:
    (folder,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder)
