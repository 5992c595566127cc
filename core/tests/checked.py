"""What `comm-core check` printed, read back."""

from __future__ import annotations

import re


def answers_in(text: str) -> dict[str, str]:
    """Each topology's answer: below every answer stand the topologies that got it, further to the right."""
    blocks = re.findall(r"^  (\S.*)\n((?: {6}\S.*\n)+)", text, re.MULTILINE)
    return {name: answer for answer, names in blocks for name in re.split(r",\s+", names.strip())}
