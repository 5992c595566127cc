"""One rank's access to the job's key-value store: clones of it, the group's incarnation, and the keys to delete.

This file alone knows torch's store and translates group ranks to the job's. `stage.py` has the protocol that the ranks
follow over it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed import distributed_c10d

from comm_core._control.deadline import run_with_deadline
from comm_core.errors import CommError, CommTimeoutError
from comm_core.types import rank_label

if TYPE_CHECKING:
    import torch.distributed as dist

# torch.distributed.Store: torch's stubs leave out its name, and `clone`.
Store = Any

__all__ = ["Control", "Store", "compare_set", "store_of"]

T = TypeVar("T")

# How long the store itself may take, in seconds: far more than it needs under load, far less than anybody's patience.
_STORE_S = 20.0


def store_of(group: dist.ProcessGroup) -> Store:
    """The key-value store under which torch made `group`, with the group's own prefix.

    torch has no public way to it; this is the one place that reaches for it, and a test holds it to every torch release
    that we support.
    """
    store: Store = distributed_c10d._get_process_group_store(group)  # noqa: SLF001 - see above
    return store


def compare_set(key: str, expected: str, value: str, store: Store) -> str:
    """Set `key` where it holds `expected`, or nothing where that is empty; returns what it holds afterwards."""
    return str(store.compare_set(key, expected, value), "ascii")


class Control:
    """One rank's end of its group's control channel. It works in stages, each a Collective step of core's: see `Stage`.

    Args:
        store: the group's store; whoever talks to it does so on a clone, since a blocked read holds the client's lock.
        rank: this rank's group rank.
        global_ranks: the job's rank of each group rank.
        timeout_s: how long an exchange waits for the others where its stage has no deadline, in seconds.

    Attributes:
        leftover: the last exchange that succeeded, "" for none. Every rank has left it once all have come to the next.
    """

    def __init__(self, store: Store, rank: int, global_ranks: tuple[int, ...], timeout_s: float) -> None:
        self.rank = rank
        self.global_ranks = global_ranks
        self.timeout_s = timeout_s
        self.leftover = ""
        self._store = store
        self._idle: list[Store] = []  # clones that nobody is using
        self._lost = ""  # why the store is given up
        self._incarnation = ""
        # Exchanges that were aborted: a thread that a deadline left behind may still be reading their keys.
        self._aborted: list[str] = []

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return len(self.global_ranks)

    @property
    def prefix(self) -> str:
        """What the keys of this incarnation begin with."""
        return f"comm_core/{self._incarnation}"

    def label(self, *ranks: int) -> str:
        """Group ranks for people, with the job's rank where that differs: "rank 1 (3 in the job)"."""
        names = [rank_label(rank, self.global_ranks[rank]) for rank in ranks]
        return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"

    def join(self, seen: set[str]) -> None:
        """Enter the group's newest incarnation, or found one where this process has used that up.

        Every `get_backend` that negotiates is an incarnation with keys of its own, so that no message of an earlier try
        is ever read. A rank that comes late finds the incarnation that the others founded and reads how it ended.

        Args:
            seen: incarnations of this group that this process has been in; the one that is joined is added.

        Raises:
            CommError: the store is gone.
        """
        key, mine, current = "comm_core/incarnation", uuid.uuid4().hex, ""
        while True:
            newest = self.ask("joining the group", functools.partial(compare_set, key, current, mine))
            if newest not in seen:
                break
            current = newest
        seen.add(newest)
        self._incarnation = newest

    def ask(self, what: str, operation: Callable[[Store], T], waits_s: float = 0.0) -> T:
        """Do `operation` with a clone of the store, in a thread: a store whose host is cut off never answers.

        Args:
            what: who asks, for errors.
            operation: called once, with the clone.
            waits_s: how long it waits for other ranks, in seconds; the store's own time comes on top.

        Raises:
            CommError: the store is gone, now or in an earlier call; as `CommTimeoutError`, it doesn't answer.
        """
        if self._lost:
            raise CommError(f"{what}: {self._lost}")
        timeout_s = waits_s + _STORE_S
        try:
            return run_with_deadline(functools.partial(self._lend, operation), timeout_s, name="the job's store")
        except CommError:
            raise
        except TimeoutError as error:
            self._lost = f"the job's store gave no answer in {timeout_s:g} s: it is frozen, or its host cut off"
            raise CommTimeoutError(f"{what}: {self._lost}") from error
        except RuntimeError as error:
            self._lost = f"the job's store can't be reached any more: {error}"
            raise CommError(f"{what}: {self._lost}") from error

    def _lend(self, operation: Callable[[Store], T]) -> T:
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._store.clone()
        value = operation(client)
        self._idle.append(client)
        return value

    def note_success(self, exchange: str) -> None:
        """Remember an exchange whose keys can be deleted once every rank has come to the next one."""
        self.leftover = exchange

    def note_abort(self, exchange: str) -> None:
        """Remember an exchange whose keys can be deleted only once every rank has left the incarnation."""
        self._aborted.append(exchange)

    def delete(self, exchange: str, store: Store) -> None:
        """Delete all keys of an exchange."""
        for key in (f"{exchange}/verdict", f"{exchange}/arrived", *(f"{exchange}/{r}" for r in range(self.world_size))):
            store.delete_key(key)

    def finish(self) -> None:
        """Leave the incarnation. Waits for nobody; the last rank to leave deletes what is left of its keys."""
        with contextlib.suppress(CommError):  # a store that is gone has no keys to delete
            self.ask("leaving the group", self._leave)
        self.leftover, self._aborted = "", []

    def _leave(self, store: Store) -> None:
        left = f"{self.prefix}/left"
        notes = [f"{left}/{rank}" for rank in range(self.world_size)]
        if self._aborted:
            # Others needn't have met these: a rank may fail where they have left the stage already.
            store.set(notes[self.rank], json.dumps(list(dict.fromkeys(self._aborted))))
        if store.add(left, 1) < self.world_size:
            return
        exchanges = {self.leftover} - {""}
        for note in notes:
            if store.check([note]):
                exchanges.update(json.loads(store.get(note)))
                store.delete_key(note)
        for exchange in exchanges:
            self.delete(exchange, store)
        store.delete_key(left)
