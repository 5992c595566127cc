"""Text for a terminal, or for whatever else stdout is."""

from __future__ import annotations

import os
import re
import sys

__all__ = ["encodable", "show"]

_GREEN, _YELLOW, _RED, _PLAIN = "\033[32m", "\033[33m", "\033[31m", "\033[0m"
# A verdict stands in a column, or ends what `doctor` says of a plugin.
_COLORED = {
    re.compile(r"(?m)(?<=  )(serves|standby)(?=  )|^ *passed(?=  )|(?<=: )loaded\b|^Nothing to fix\.$"): _GREEN,
    re.compile(r"(?m)(?<=  )(unavailable|blocked)(?=  )|^ *skipped(?=  )|(?<=: )not loaded(?=: )"): _YELLOW,
    re.compile(r"(?m)(?<=  )failed(?=  )|^ *failed(?=  )|(?<=: )can't be used(?=: )|^To fix$"): _RED,
}


def encodable(text: str, stream: object) -> str:
    """Return the text with escapes for what the stream's encoding lacks: it may quote other software's text."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show(text: str, end: str = "\n") -> None:
    """Print a report to stdout; on a terminal, color its verdicts, unless NO_COLOR is set (https://no-color.org)."""
    text = encodable(text, sys.stdout)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        for pattern, color in _COLORED.items():
            text = pattern.sub(rf"{color}\g<0>{_PLAIN}", text)
    print(text, end=end, flush=True)
