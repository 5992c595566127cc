"""Text for a terminal, or for whatever else stdout is."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

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


def _fold(line: str, width: int) -> str:
    """Return the line as one or more that fit, of which the later ones begin below the last column that leaves room."""
    if len(line) <= width:
        return line
    columns = [gap.end() for gap in re.finditer(r"(?<=\S)  +(?=\S)", line[: width * 4 // 5])]
    indent = columns[-1] if columns else len(line) - len(line.lstrip()) + 2
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def show(text: str, end: str = "\n") -> None:
    """Print a report to stdout.

    On a terminal, fold lines that are longer than its width, and color verdicts unless NO_COLOR is set
    (https://no-color.org).
    """
    text = encodable(text, sys.stdout)
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(_fold(line, width) for line in text.split("\n"))
        for pattern, color in ({} if os.environ.get("NO_COLOR") else _COLORED).items():
            text = pattern.sub(rf"{color}\g<0>{_PLAIN}", text)
    print(text, end=end, flush=True)
