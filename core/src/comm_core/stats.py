"""The numbers of a group's calls and waits on this rank; see `Backend.stats` and `Backend.waits`."""

from __future__ import annotations

import dataclasses

__all__ = ["RouteStats", "WaitStats"]


@dataclasses.dataclass(frozen=True)
class RouteStats:
    """The calls of one rank that one backend served on one route; see `Backend.stats`.

    Attributes:
        op: one of `OPS`.
        mode: "eager" for calls that ran at once, "graph" for those that a stream captured; replays don't count.
        device_type: such as "cuda".
        dtype: torch's name of the dtype.
        backend: the backend's name.
        calls: the number of calls.
        nbytes: the bytes of the reduced tensors, over all calls.
        wire: the quantised wire by which these tensors travelled, one of `WIRES`; "": none, and their sums are exact.
    """

    op: str
    mode: str
    device_type: str
    dtype: str
    backend: str
    calls: int
    nbytes: int
    wire: str = ""


@dataclasses.dataclass(frozen=True)
class WaitStats:
    """This rank's waits for one peer, in one backend; see `Backend.waits`.

    Attributes:
        backend: the backend's name.
        rank: the group rank of the peer.
        waits: the number of waits that the backend counts: very short ones are part of every exchange.
        total_us: the time of all of them, in microseconds.
        longest_us: the longest one, in microseconds.
    """

    backend: str
    rank: int
    waits: int
    total_us: float
    longest_us: float
