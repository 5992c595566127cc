"""One rank's access to the job's key-value store: clones of it, the group's incarnation, and the keys to delete.

Only this module knows torch's store and translates group ranks to the job's. `stage.py` has the protocol of the ranks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed import distributed_c10d

from comm_core._control.deadline import run_with_deadline
from comm_core._schema import MalformedError, load_json, text, tuple_of
from comm_core.errors import CommError, CommTimeoutError
from comm_core.types import rank_label

if TYPE_CHECKING:
    import torch.distributed as dist

# torch.distributed.Store: torch's stubs lack its name and `clone`.
Store = Any

__all__ = ["Control", "Store", "compare_set", "delete_key", "store_of"]

T = TypeVar("T")

# The deadline of the store itself, in seconds: far above its response time under load, far below the default control
# timeout.
_STORE_S = 20.0
# pybind11's text if a store written in Python lacks a method, and torch's if that is `compare_set`.
_LACKING = re.compile(r'pure virtual function "[^"]*?(\w+)"|INTERNAL ASSERT FAILED.*Not implemented', re.DOTALL)


def store_of(group: dist.ProcessGroup) -> Store:
    """Return the key-value store with which torch created `group`, with the group's own prefix.

    torch has no public function for it. Only this function uses the private one, and a test pins it on every supported
    torch release.
    """
    store: Store = distributed_c10d._get_process_group_store(group)  # noqa: SLF001 - see above
    return store


def compare_set(key: str, expected: str, value: str, store: Store) -> str:
    """Set `key` if its value is `expected`, or if `expected` is "" and it has none; return its value afterwards."""
    return str(store.compare_set(key, expected, value), "ascii", "replace")


def _clone(store: Store) -> Store:
    """Return a clone of the store; the store itself if it is written in Python, and so has no `clone`.

    Core never waits inside a store, so no call of another thread has to wait long for that one's lock.
    """
    try:
        return store.clone()
    except RuntimeError as error:
        if _LACKING.search(str(error)) is None:
            raise
        return store


def delete_key(key: str, store: Store) -> None:
    """Delete a key, unless the store is written in Python and can't delete."""
    try:
        store.delete_key(key)
    except RuntimeError as error:
        if _LACKING.search(str(error)) is None:
            raise


class Control:
    """One rank's access to its group's control channel. Its exchanges belong to stages: see `Stage`.

    Args:
        store: the group's store; each call uses a clone, since a blocked read holds the client's lock.
        rank: this rank's group rank.
        global_ranks: the job's rank of each group rank.
        timeout_s: how long an exchange waits for the others if its stage has no deadline, in seconds.

    Attributes:
        last_success: the last exchange that succeeded, "" for none. Every rank has left it once all are in the next.
    """

    def __init__(self, store: Store, rank: int, global_ranks: tuple[int, ...], timeout_s: float) -> None:
        self.rank = rank
        self.global_ranks = global_ranks
        self.timeout_s = timeout_s
        self.last_success = ""
        self._store = store
        self._idle_clones: list[Store] = []  # clones that no thread uses
        self._failure = ""  # the reason why the store is given up
        self._incarnation = ""
        # Aborted exchanges: a thread that outlives its deadline may still read their keys.
        self._aborted: list[str] = []

    @property
    def world_size(self) -> int:
        """The number of ranks in the group."""
        return len(self.global_ranks)

    @property
    def prefix(self) -> str:
        """The prefix of this incarnation's keys."""
        return f"comm_core/{self._incarnation}"

    def label(self, *ranks: int) -> str:
        """Format group ranks for a message, with the job's rank if that differs: "rank 1 (3 in the job)"."""
        names = [rank_label(rank, self.global_ranks[rank]) for rank in ranks]
        return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"

    def join(self, seen: set[str]) -> None:
        """Join the group's newest incarnation, or create one if this process has been in that one.

        Every negotiation is an incarnation with keys of its own, so that no message of an earlier one is ever read. A
        late rank joins the incarnation that the others created and reads its verdicts.

        Args:
            seen: the incarnations of this group that this process has been in; gains the joined one.

        Raises:
            CommError: the store is gone.
        """
        key, mine, current = "comm_core/incarnation", uuid.uuid4().hex, ""
        while True:
            newest = self.call_store("joining the group", functools.partial(compare_set, key, current, mine))
            if newest not in seen:
                break
            current = newest
        seen.add(newest)
        self._incarnation = newest

    def call_store(self, what: str, operation: Callable[[Store], T], waits_s: float = 0.0) -> T:
        """Run `operation` on a clone of the store, in a thread: a store on an unreachable host never answers.

        Args:
            what: the caller's name in errors.
            operation: called once, with the clone.
            waits_s: how long it may wait for other ranks, in seconds; the store's own deadline is added.

        Raises:
            CommError: the store is gone, now or in an earlier call; as `CommTimeoutError`, it doesn't answer.
        """
        if self._failure:
            raise CommError(f"{what}: {self._failure}")
        timeout_s = waits_s + _STORE_S
        try:
            return run_with_deadline(
                functools.partial(self._run_on_clone, operation), timeout_s, name="the job's store"
            )
        except CommError:
            raise
        except TimeoutError as error:
            self._failure = (
                f"the job's store gave no answer in {timeout_s:g} s: it is frozen, or its host is unreachable"
            )
            raise CommTimeoutError(f"{what}: {self._failure}") from error
        except RuntimeError as error:
            lacking = _LACKING.search(str(error))
            self._failure = (
                f"the job's store, a {type(self._store).__name__} written in Python, has no method "
                f"{lacking[1] or 'compare_set'}. Add it, or give init_process_group another store"
                if lacking
                else f"the job's store can't be reached any more: {error}"
            )
            raise CommError(f"{what}: {self._failure}") from error

    def _run_on_clone(self, operation: Callable[[Store], T]) -> T:
        try:
            client = self._idle_clones.pop()
        except IndexError:
            client = _clone(self._store)
        value = operation(client)
        self._idle_clones.append(client)
        return value

    def note_success(self, exchange: str) -> None:
        """Remember a successful exchange: its keys can be deleted once every rank has arrived at the next one."""
        self.last_success = exchange

    def note_abort(self, exchange: str) -> None:
        """Remember an aborted exchange: its keys can be deleted once every rank has left the incarnation."""
        self._aborted.append(exchange)

    def delete(self, exchange: str, store: Store) -> None:
        """Delete all keys of an exchange."""
        for key in (f"{exchange}/verdict", f"{exchange}/arrived", *(f"{exchange}/{r}" for r in range(self.world_size))):
            delete_key(key, store)

    def finish(self) -> None:
        """Leave the incarnation without waiting; the last rank to leave deletes its remaining keys."""
        with contextlib.suppress(CommError):  # a store that is gone has no keys to delete
            self.call_store("leaving the group", self._leave)
        self.last_success, self._aborted = "", []

    def _leave(self, store: Store) -> None:
        left = f"{self.prefix}/left"
        notes = [f"{left}/{rank}" for rank in range(self.world_size)]
        if self._aborted:
            # The others may not know of these: a rank may fail after they have left the stage.
            store.set(notes[self.rank], json.dumps(list(dict.fromkeys(self._aborted))))
        if store.add(left, 1) < self.world_size:
            return
        exchanges = {self.last_success} - {""}
        for note in notes:
            if store.check([note]):
                with contextlib.suppress(MalformedError):  # left to the store; this incarnation is over
                    noted = tuple_of(text)(load_json(store.get(note)), "note")
                    exchanges.update(exchange for exchange in noted if exchange.startswith(f"{self.prefix}/"))
                delete_key(note, store)
        for exchange in exchanges:
            self.delete(exchange, store)
        delete_key(left, store)
