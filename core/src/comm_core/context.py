"""The arguments that core passes to a plugin's Collective hooks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    import torch.distributed

__all__ = ["Agreement", "ControlChannel", "GroupContext", "Shapes"]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The result of a vote, equal on every rank.

    Attributes:
        ok: whether every rank voted yes.
        reasons: by group rank, the reasons of those that voted no.
    """

    ok: bool
    reasons: Mapping[int, str]


class ControlChannel(Protocol):
    """Exchanges between the ranks of a group inside a Collective hook: over the job's store, without collectives.

    Use it only inside a Collective hook, in one thread at a time, and in the same order on every rank. Each call has a
    deadline. Once a rank has failed, every call in this hook raises the same `CommError` on all ranks, also if an
    earlier one was caught.
    """

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, by group rank: JSON, at most 64 KiB as text. Send bytes as hex or base64."""

    def barrier(self) -> None:
        """Return once every rank has called it."""

    def agree(self, ok: bool, reason: str = "") -> Agreement:
        """Vote; return whether every rank is `ok`, and the reasons of those that aren't."""


@dataclasses.dataclass(frozen=True)
class GroupContext:
    """A group as one of its ranks sees it; without `connect`, also a plugin's session.

    Attributes:
        group: the process group for every call of torch.distributed in this session.
        rank: this rank's place in the group.
        world_size: ranks in the group.
        device: where the group's tensors live, with its index: `torch.device("cuda", 3)`.
        global_ranks: the job's rank of each group rank.
        control: talks to the other ranks inside Collective hooks.
        memory_budget_nbytes: device memory that this session may take for its buffers, in bytes.
        wait_timeout_s: how long a call of the hot path may wait for a peer, in seconds.
    """

    group: torch.distributed.ProcessGroup
    rank: int
    world_size: int
    device: torch.device
    global_ranks: tuple[int, ...]
    control: ControlChannel
    memory_budget_nbytes: int
    wait_timeout_s: float


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The calls that `comm.pre_capture_init` prepares for: up to `[max_tokens, hidden_size]` of `dtype`.

    Attributes:
        max_tokens: the most rows.
        hidden_size: elements a row.
        dtype: of the tensors.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
