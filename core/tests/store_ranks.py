"""Stores that aren't torch's own, and what the ranks of test_stores.py do with them; runs in their processes."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core._control.store import store_of
from handle_ranks import Outcome, outcome
from harness import side_store

# For every wait in torch, in seconds: a test that would need it has failed.
TIMEOUT = timedelta(seconds=60)


class InMemory(dist.Store):
    """A store written in Python for threads of one process, with the methods that torch itself calls, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str | bytes) -> None:
        with self.changed:
            self.values[key] = value.encode() if isinstance(value, str) else bytes(value)
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        with self.changed:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
            return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        old, new = (value.encode() if isinstance(value, str) else bytes(value) for value in (expected, desired))
        with self.changed:
            if self.values.get(key, b"") == old:
                self.values[key] = new
            return self.values.get(key, old)

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.check(keys), timeout.total_seconds()):
                raise LookupError(f"{keys} didn't come")


class Wrapper(dist.Store):
    """A store written in Python around another one, as for logging: also for ranks in different processes."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store: Any = store

    def set(self, key: str, value: bytes) -> None:
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        return bytes(self.store.get(key))

    def add(self, key: str, amount: int) -> int:
        return int(self.store.add(key, amount))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return bytes(self.store.compare_set(key, expected, desired))

    def check(self, keys: list[str]) -> bool:
        return bool(self.store.check(keys))

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:
        self.store.wait(keys, timeout)


class Cloneable(Wrapper):
    """Has a `clone`, as its author thinks; but torch drops the Python part of what it returns."""

    def clone(self) -> dist.Store:
        return Cloneable(self.store.clone())


class Deleting(Wrapper):
    """Can delete and count keys, under the names by which torch finds that from under a prefix, too."""

    def delete_key(self, key: str) -> bool:
        return bool(self.store.delete_key(key))

    def num_keys(self) -> int:
        return int(self.store.num_keys())

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815


#: The operations without which a store can't serve.
OPERATIONS = ("set", "get", "add", "check", "compare_set")


def lacking(operation: str) -> type[InMemory]:
    """A class of stores that has every operation except one, which refuses as torch's own base class does."""

    class Lacking(InMemory):
        pass

    setattr(Lacking, operation, getattr(dist.Store, operation))
    return Lacking


def wrong(operation: str) -> type[InMemory]:
    """A class of stores in which one operation returns something, but not what it ought to."""

    class Wrong(InMemory):
        pass

    result = {"set": None, "get": b"?", "add": 7, "check": True, "compare_set": b"?"}[operation]
    setattr(Wrong, operation, lambda *_: result)
    return Wrong


class Breaking(InMemory):
    """Raises `error` in every operation once it is set, as a store over a connection of its own does."""

    error: Exception | None = None

    def check(self, keys: list[str]) -> bool:
        if self.error is not None:
            raise self.error
        return super().check(keys)


# --- in processes ---


@contextlib.contextmanager
def world_over(kind: str, folder: str) -> Iterator[dist.Store]:
    """Replace the default process group by one over a store of this kind."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tcp = dist.PrefixStore("another world", side_store().clone())
    dist.destroy_process_group()
    file = functools.partial(dist.FileStore, f"{folder}/store", size)
    store: dist.Store = {
        "file": file,
        "prefixes of a file": lambda: dist.PrefixStore("outer", dist.PrefixStore("inner", file())),
        "wrapper of a file": lambda: Wrapper(file()),
        "wrapper of TCP": lambda: Wrapper(tcp),
        "cloneable": lambda: Cloneable(tcp),
        "deleting": lambda: Deleting(tcp),
    }[kind]()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield store
    comm.close()
    dist.destroy_process_group()


def negotiate_twice(kind: str, folder: str) -> list[Any]:
    """Two incarnations of the world and one of a subgroup, each with the backend's own process group."""
    found: list[Any] = []
    with world_over(kind, folder) as store:
        timeout = store_of(dist.group.WORLD).timeout
        for group in (None, None, dist.new_group(list(range(dist.get_world_size())))):
            backend = comm.get_backend(group)
            found.append((backend.name, backend.all_reduce(torch.full((3000,), dist.get_rank() + 1.0))[-1].item()))
            comm.close()
        assert store_of(dist.group.WORLD).timeout == timeout
        dist.barrier()  # no rank's store ends before the others have left it
        del store
    return found


def abort_at_once(kind: str, folder: str, on: Collection[int]) -> Outcome:
    """A rank can't read its settings, far before any deadline of the others."""
    with world_over(kind, folder):
        if dist.get_rank() in on:
            os.environ["COMM_CORE_CONTROL_TIMEOUT_S"] = "soon"
        found = outcome(comm.get_backend)
        dist.barrier()
    return found


def get_over_an_unfit_store(folder: str) -> Outcome:
    """The default group's store has everything that Gloo needs, but no `compare_set`."""

    class Unfit(Wrapper):
        compare_set = dist.Store.compare_set

    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = Unfit(dist.FileStore(f"{folder}/store", size))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    found = outcome(comm.get_backend)
    dist.barrier()
    dist.destroy_process_group()
    return found


def end_right_after_the_error() -> Outcome:
    """The settings differ. The first rank serves the store, and its process ends as soon as it has the error."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        side_store().set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(side_store().get("port")), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    os.environ["COMM_CORE_WAIT_TIMEOUT_S"] = str(10 + rank)
    found = outcome(comm.get_backend)
    side_store().set(f"ended/{rank}", found[0])
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
