"""`importlib.metadata` with the interface of Python 3.12, from the backport on older versions."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 12):
    from importlib import metadata
else:
    import importlib_metadata as metadata

__all__ = ["metadata"]
