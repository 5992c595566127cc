"""One rank's access to the job's key-value store: clones of it, the group's incarnation, and the keys to delete.

Only this module knows torch's store and translates group ranks to the job's. `stage.py` has the protocol of the ranks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from comm_core._control.deadline import describe, polls, run_with_deadline
from comm_core._schema import MalformedError, load_json, text, tuple_of
from comm_core.errors import CommError, CommTimeoutError, NegotiationError
from comm_core.types import rank_label

# torch.distributed.Store: torch's stubs lack its name and `clone`, and the names of its subclasses.
Store = Any
_dist: Any = dist

__all__ = ["Control", "Store", "can_clone", "compare_set", "store_of"]

T = TypeVar("T")

# The deadline of the store itself, in seconds: far above its response time under load, far below the default control
# timeout.
_STORE_S = 20.0
# The longest wait of a rank whose negotiation failed until the others have left, too, in seconds: many of their polls.
_LEAVE_S = 5.0


def store_of(group: dist.ProcessGroup) -> Store:
    """Return the key-value store with which torch created `group`, with the group's own prefix.

    torch has no public function for it. Only this function uses the private one, and a test pins it on every supported
    torch release.
    """
    store: Store = distributed_c10d._get_process_group_store(group)  # noqa: SLF001 - see above
    return store


def can_clone(store: Store) -> bool:
    """Return whether the store is one of torch's own, which can be cloned.

    A store written in Python can't: even if it has a `clone`, torch keeps only the clone's C++ part, without methods.
    """
    return isinstance(_innermost(store), (_dist.FileStore, _dist.HashStore, _dist.TCPStore))


def _innermost(store: Store) -> Store:
    """Return the store under all prefixes."""
    while isinstance(store, _dist.PrefixStore):
        store = store.underlying_store
    return store


class SharedStore:
    """A store that all threads share, because it can't be cloned.

    Sharing is safe: core never waits inside a store, so no thread holds its locks for long.

    Args:
        store: the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # torch's prefixes keep only the C++ part of a store written in Python.
        self._innermost = _innermost(store)

    def clone(self) -> SharedStore:
        """Return this object."""
        return self

    def delete_key(self, key: str) -> None:
        """Delete a key if the store can; otherwise the key stays, and is never read again."""
        with contextlib.suppress(Exception):  # foreign code; if the store is gone, the next operation raises
            self._store.delete_key(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def check_operations(self) -> None:
        """Check that the store does each operation that core needs; leaves two keys in a store that can't delete.

        Raises:
            NegotiationError: it doesn't; the text names the operation.
        """
        key = f"comm_core/trial/{uuid.uuid4().hex}"
        trials: dict[str, Callable[[], bool]] = {
            "check": lambda: not self.check([key]),
            "compare_set": lambda: (
                [compare_set(key, old, new, self) for old, new in ("--", ("", "1"), ("", "2"))] == ["-", "1", "1"]
            ),
            "get": lambda: bool(self.get(key) == b"1"),
            "set": lambda: bool((self.set(key, "2"), self.get(key))[1] == b"2"),
            "add": lambda: [self.add(f"{key}/count", 1) for _ in range(2)] == [1, 2],
        }
        for name, works in trials.items():
            try:
                failure = "" if works() else "its result is wrong"
            except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises, it can't
                failure = describe(error)
            if failure:
                kind = type(self._innermost).__name__
                raise NegotiationError(
                    "this group can't negotiate: its ranks exchange through the store that init_process_group got, "
                    f"and this one (a {kind}) can't do {name}: {failure}. Use a store of torch's own, such as "
                    "torch.distributed.TCPStore. For a store written in Python, add the operation, and keep a "
                    "reference to the store"
                )
        self.delete_key(key)
        self.delete_key(f"{key}/count")


def compare_set(key: str, expected: str, value: str, store: Store) -> str:
    """Set `key` if its value is `expected`, or if `expected` is "" and it has none.

    Returns:
        Its value afterwards; `expected` if it has none.
    """
    return str(store.compare_set(key, expected, value), "ascii", "replace")


class Control:
    """One rank's access to its group's control channel. Its exchanges belong to stages: see `Stage`.

    Args:
        store: the group's store; each call uses a clone if that is possible, since a blocked read holds the client's
            lock.
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
        self._store = store if can_clone(store) else SharedStore(store)
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
            NegotiationError: the store lacks an operation.
            CommError: the store is gone.
        """
        if isinstance(self._store, SharedStore):
            self.call_store("joining the group", SharedStore.check_operations)
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
        except Exception as error:  # a store written in Python may raise errors of any type
            self._failure = f"the job's store can't be reached any more: {describe(error)}"
            raise CommError(f"{what}: {self._failure}") from error

    def _run_on_clone(self, operation: Callable[[Store], T]) -> T:
        try:
            client = self._idle_clones.pop()
        except IndexError:
            client = self._store.clone()
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
            store.delete_key(key)

    def finish(self, error: BaseException | None = None) -> None:
        """Leave the incarnation; the last rank to leave deletes its remaining keys.

        Args:
            error: the error with which this rank leaves. If it is one that all ranks get, this one waits a little until
                they have left, too: its process may end now and take the store along, in which they read the error.
        """
        agreed = isinstance(error, CommError) and not isinstance(error, CommTimeoutError)
        patience_s = _LEAVE_S if agreed else 0.0
        with contextlib.suppress(CommError):  # a store that is gone has no keys to delete
            self.call_store("leaving the group", functools.partial(self._leave, patience_s), patience_s)
        self.last_success, self._aborted = "", []

    def _leave(self, patience_s: float, store: Store) -> None:
        left = f"{self.prefix}/left"
        notes = [f"{left}/{rank}" for rank in range(self.world_size)]
        if self._aborted:
            # The others may not know of these: a rank may fail after they have left the stage.
            store.set(notes[self.rank], json.dumps(list(dict.fromkeys(self._aborted))))
        if store.add(left, 1) < self.world_size:
            for _ in polls(patience_s) if patience_s else ():
                if not store.check([left]):  # the last rank has deleted it
                    break
            return
        exchanges = {self.last_success} - {""}
        for note in notes:
            if store.check([note]):
                with contextlib.suppress(MalformedError):  # left to the store; this incarnation is over
                    noted = tuple_of(text)(load_json(store.get(note)), "note")
                    exchanges.update(exchange for exchange in noted if exchange.startswith(f"{self.prefix}/"))
                store.delete_key(note)
        for exchange in exchanges:
            self.delete(exchange, store)
        store.delete_key(left)
