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
        ok: True if every rank voted yes.
        reasons: the reasons of the ranks that voted no, by group rank.
    """

    ok: bool
    reasons: Mapping[int, str]

    def __bool__(self) -> bool:
        """Return `ok`."""
        return self.ok


class ControlChannel(Protocol):
    """Exchanges between the ranks of a group inside a Collective hook: over the job's store, without collectives.

    Use it only inside a Collective hook, in one thread at a time, and in the same order on every rank. Each call has a
    deadline. Once a rank has failed, every call in this hook raises the same `CommError` on all ranks, even if the hook
    caught an earlier one.
    """

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by group rank.

        A value is JSON, at most 64 KiB as text, nested at most 60 levels deep. Send bytes as hex or base64.
        """

    def barrier(self) -> None:
        """Wait until every rank has called it."""

    def agree(self, ok: bool, reason: str = "") -> Agreement:
        """Vote, and return the result of the vote.

        `reason` counts only if this rank isn't `ok`.

        Raises:
            TypeError: `ok` isn't a bool; the call then fails on all ranks.
        """


@dataclasses.dataclass(frozen=True)
class GroupContext:
    """A group from the view of one rank; also the session of a plugin without `connect`.

    Attributes:
        group: a process group of this backend's own, with the ranks of the user's group, for its calls of
            torch.distributed. Made when it is first read, which is Collective: every rank reads it at the same point,
            and not while a graph is captured. It waits for the other ranks as long as `connect` may take, and so do
            its calls over Gloo. Core aborts it when the backend fails or its session is closed; reading it after that
            raises `CommError`. No other backend uses it, nor does the terminal fallback.
        rank: this rank's place in the group.
        world_size: ranks in the group.
        device: the device of the group's tensors, with its index: `torch.device("cuda", 3)`.
        global_ranks: the job's rank of each group rank.
        control: the channel to the other ranks, for Collective hooks.
        memory_budget_nbytes: device memory that this session may take for its buffers, in bytes.
        wait_timeout_s: the longest that a hot-path call may wait for a peer, in seconds; also the deadline of the hooks
            `check` and `close`, and in `comm-core tune` of `variants` and `use_variants`.
        wire: the quantised wire that the group asks for, one of `comm_core.types.WIRES`; "": none. Plain sums within
            the backend's ranges of this wire travel quantised; all other sums are exact.
    """

    group: torch.distributed.ProcessGroup = dataclasses.field(repr=False, compare=False)
    rank: int
    world_size: int
    device: torch.device
    global_ranks: tuple[int, ...]
    control: ControlChannel
    memory_budget_nbytes: int
    wait_timeout_s: float
    wire: str = ""


class _GroupField:
    """The attribute `GroupContext.group`, which may be given as a function that each read calls."""

    def __get__(self, context: GroupContext | None, _owner: object) -> Any:
        if context is None:
            return self
        group = vars(context)["group"]
        return group() if callable(group) else group

    def __set__(self, context: GroupContext, group: Any) -> None:
        vars(context)["group"] = group


# Set here, not in the class: there `dataclass` would take it for the default of the field.
GroupContext.group = _GroupField()  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The calls that `comm.pre_capture_init` prepares for: up to `[max_tokens, hidden_size]` of `dtype`.

    Attributes:
        max_tokens: the largest number of rows.
        hidden_size: elements per row.
        dtype: the dtype of the tensors.
    """

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
