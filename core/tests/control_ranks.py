"""What the control channel's tests share: threads as ranks, and a store whose operations can be seen and held."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from comm_core._control.stage import Stage
from comm_core._control.store import Control

T = TypeVar("T")

#: For what must happen at once, in seconds: a hang fails, a slow machine doesn't.
PATIENCE_S = 60.0
#: A deadline that no test waits for, in seconds: who is released was released by something else.
NEVER_S = 3600.0


def start(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Run `work` in a daemon thread: one that hangs keeps neither the test nor the process."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - a thread's exception is lost unless it is passed on
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def outcome(future: concurrent.futures.Future[T]) -> T | BaseException:
    """What a thread returned or raised."""
    _, hanging = concurrent.futures.wait([future], PATIENCE_S)
    assert not hanging, "a rank hangs"
    error = future.exception()
    return future.result() if error is None else error


def in_threads(members: list[Control], work: Callable[[Control], T]) -> list[T | BaseException]:
    """What `work` returned or raised on each of the ranks, all at once."""
    futures = [start(lambda member=member: work(member)) for member in members]
    return [outcome(future) for future in futures]


def group_of(
    store: Any,
    world_size: int,
    *,
    timeout_s: float = NEVER_S,
    global_ranks: tuple[int, ...] | None = None,
    seen: list[set[str]] | None = None,
) -> list[Control]:
    """Every rank's end of a group's control channel, in one incarnation; a list has a store for each."""
    ranks = tuple(range(world_size)) if global_ranks is None else global_ranks
    stores = store if isinstance(store, list) else [store] * world_size
    members = [Control(stores[rank], rank, ranks, timeout_s) for rank in range(world_size)]
    for rank, member in enumerate(members):
        member.join(set() if seen is None else seen[rank])
    return members


def in_stage(member: Control, name: str, work: Callable[[Stage], T], timeout_s: float | None = None) -> T:
    with Stage(member, name, timeout_s) as stage:
        return work(stage)


def server() -> dist.TCPStore:
    """A TCP store; its clones are clients of it."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class WatchedStore:
    """A store that tells `watch` of each operation, by name and arguments, before any of its clones does it."""

    def __init__(self, store: dist.Store, watch: Callable[[str, tuple[Any, ...]], None]) -> None:
        self._store = store
        self._watch = watch

    def clone(self) -> WatchedStore:
        return WatchedStore(self._store.clone(), self._watch)

    @property
    def __class__(self) -> type:  # it is one of torch's stores, as far as core can see
        return type(self._store)

    @property
    def underlying_store(self) -> dist.Store:
        return self._store.underlying_store  # type: ignore[attr-defined,no-any-return]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._store, name)

        def watched(*arguments: Any) -> Any:
            self._watch(name, arguments)
            return operation(*arguments)

        return watched


class Hold:
    """Stops the first operation that `meets` describes, until `release`."""

    def __init__(self, meets: Callable[[str, Any], bool]) -> None:
        self._meets = meets
        self._once = threading.Lock()
        self._held = threading.Event()
        self._free = threading.Event()

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> None:
        if not self._meets(name, arguments[0] if arguments else None) or not self._once.acquire(blocking=False):
            return
        self._held.set()
        assert self._free.wait(PATIENCE_S), "this operation was never released"

    def wait(self) -> None:
        assert self._held.wait(PATIENCE_S), "this operation was never reached"

    def release(self) -> None:
        self._free.set()
