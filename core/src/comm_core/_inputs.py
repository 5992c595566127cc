"""How ranks tell each other what their captured calls read: allocations, offsets, handles; see registration.py."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from comm_core.context import ControlChannel

__all__ = ["Inputs", "Span", "gather_parts", "handle_of"]

# Of a part, as text: within a message's 64 KiB.
_PART_CHARS = 60_000


@dataclasses.dataclass(frozen=True)
class Span:
    """Pieces of a rank's memory that lie side by side; how a call's input is told to peers, with an offset."""

    sharing: int
    pieces: tuple[tuple[int, int, str], ...]  # base, bytes, key

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for _, _, key in self.pieces)


@dataclasses.dataclass
class Inputs:
    """What this rank tells its peers of the calls that it recorded."""

    spans: dict[Span, int] = dataclasses.field(default_factory=dict)  # and each one's number
    rows: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # number of the span, offset
    handles: dict[str, str | None] = dataclasses.field(default_factory=dict)  # of new pieces; None for a file

    def parts(self) -> list[str]:
        """As text, in parts."""
        spans = [[span.sharing, span.pieces] for span in self.spans]
        packed = zlib.compress(json.dumps([spans, self.rows, self.handles]).encode(), 1)
        text = base64.b64encode(packed).decode()
        return [text[begin : begin + _PART_CHARS] for begin in range(0, len(text), _PART_CHARS)]


def handle_of(handles: Mapping[str, str | None], key: str) -> bytes:
    handle = handles.get(key)
    if handle is None:
        raise RuntimeError(f"the allocation {key} came without a handle")
    return bytes.fromhex(handle)


def gather_parts(control: ControlChannel, parts: Sequence[str], counts: Sequence[int]) -> list[Any]:
    """What each rank said in its parts, by rank: spans, rows, handles."""
    texts = [""] * len(counts)
    for number in range(max(counts)):
        said = control.all_gather(parts[number] if number < len(parts) else "")
        texts = [text + part for text, part in zip(texts, said, strict=True)]
    return [json.loads(zlib.decompress(base64.b64decode(text))) for text in texts]
