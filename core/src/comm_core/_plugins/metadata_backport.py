"""The one place that picks between the standard library's metadata and its backport.

The interface settled with Python 3.12; the backport gives older Pythons the same one.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 12):
    from importlib import metadata
else:
    import importlib_metadata as metadata

__all__ = ["metadata"]
