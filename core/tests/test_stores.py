"""Stores that aren't torch's own: each serves, or is refused at once with the operation that it lacks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import own_group_ranks as plugins
import pytest
import store_ranks
import torch.distributed as dist
from comm_core._control.stage import Stage, StageAbortedError
from comm_core._control.store import Control, can_clone
from comm_core.errors import CommError, NegotiationError
from control_ranks import NEVER_S, PATIENCE_S, group_of, in_stage, in_threads, outcome, server, start
from harness import DEAD, install
from store_ranks import OPERATIONS, Breaking, Cloneable, Deleting, InMemory, Wrapper, lacking, wrong

if TYPE_CHECKING:
    from harness import Ranks

KINDS: dict[str, Callable[[], dist.Store]] = {
    "in memory": InMemory,
    "wrapper": lambda: Wrapper(dist.HashStore()),
    "wrapper of TCP": lambda: Wrapper(server()),
    "cloneable": lambda: Cloneable(server()),
    "deleting": lambda: Deleting(server()),
}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> dist.Store:
    return KINDS[request.param]()


@pytest.fixture(params=[0, 1, 2])
def prefixed(request: pytest.FixtureRequest, store: dist.Store) -> dist.Store:
    """The store, under so many prefixes; torch puts two around that of `init_process_group`."""
    for number in range(request.param):
        store = dist.PrefixStore(str(number), store)
    return store


def gather_often(member: Control) -> list[Any]:
    return in_stage(member, "step", lambda stage: [stage.all_gather(member.rank) for _ in range(5)])


def test_ranks_exchange_over_a_store_in_python(store: dist.Store, prefixed: dist.Store) -> None:
    assert not can_clone(prefixed)
    seen = [set[str](), set[str](), set[str]()]
    for _ in range(2):
        members = group_of(prefixed, 3, seen=seen)
        assert in_threads(members, gather_often) == [[[0, 1, 2]] * 5] * 3
        assert in_threads(members, Control.finish) == [None] * 3
    del store


def test_an_abort_reaches_ranks_that_wait_over_a_store_in_python(store: dist.Store, prefixed: dist.Store) -> None:
    """Also from a thread of the rank that waits: that one holds no lock of the store."""
    members = group_of(prefixed, 2, timeout_s=NEVER_S)
    stage = Stage(members[0], "step")
    waiting = start(stage.barrier)
    while not prefixed.check([f"{members[0].prefix}/step/0/arrived"]):
        pass
    stage.abort("no time left")
    for error in (outcome(waiting), outcome(start(lambda: in_stage(members[1], "step", Stage.barrier)))):
        assert isinstance(error, StageAbortedError)
        assert error.reason == "no time left"
    del store


def test_torchs_own_stores_are_cloned_under_any_number_of_prefixes(tmp_path: Path) -> None:
    for kind in (dist.HashStore(), server(), dist.FileStore(str(tmp_path / "store"), 1)):
        assert can_clone(kind)
        assert can_clone(dist.PrefixStore("outer", dist.PrefixStore("inner", kind)))


@pytest.mark.parametrize("prefixes", [0, 1])
@pytest.mark.parametrize("fault", [lacking, wrong])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_that_lacks_an_operation_is_refused_at_once(
    operation: str, fault: Callable[[str], type[InMemory]], prefixes: int
) -> None:
    unfit = fault(operation)()
    store = dist.PrefixStore("outer", unfit) if prefixes else unfit
    control = Control(store, 0, (0, 1), NEVER_S)
    with pytest.raises(NegotiationError) as raised:
        control.join(set())
    assert f"this one (a {type(unfit).__name__}) can't do {operation}: " in str(raised.value)
    assert "torch.distributed.TCPStore" in str(raised.value)


def test_a_store_in_python_that_is_gone_is_refused_at_once() -> None:
    """torch keeps only the C++ part of a store that the program no longer refers to."""
    store = dist.PrefixStore("outer", InMemory())
    gc.collect()
    with pytest.raises(NegotiationError, match="keep a reference to the store"):
        Control(store, 0, (0, 1), NEVER_S).join(set())


def test_a_store_in_python_stays_while_core_uses_it() -> None:
    store = InMemory()
    members = group_of(dist.PrefixStore("outer", store), 2)
    del store
    gc.collect()
    assert in_threads(members, gather_often) == [[[0, 1]] * 5] * 2


@pytest.mark.parametrize("error", [KeyError("gone"), ConnectionResetError("by peer"), ValueError("?"), OSError(5, "?")])
def test_whatever_a_store_in_python_raises_is_named(error: Exception) -> None:
    store = Breaking()
    members = group_of(store, 2, timeout_s=PATIENCE_S)
    store.error = error
    for _ in range(2):
        for found in in_threads([members[0]], gather_often):
            assert isinstance(found, CommError)
            assert f"the job's store can't be reached any more: {type(error).__name__}" in str(found)
    members[0].finish()


# --- in processes ---


@pytest.fixture
def backend(tmp_path: Path) -> list[list[Path]]:
    """A backend with a process group of its own, on two ranks."""
    source = f"import own_group_ranks\nplugin = own_group_ranks.{plugins.Summing.__name__}()"
    return [[install(tmp_path / "acme", "acme", source)]] * 2


@pytest.mark.parametrize(
    "kind", ["file", "prefixes of a file", "wrapper of a file", "wrapper of TCP", "cloneable", "deleting"]
)
def test_a_group_over_any_store_is_served(ranks: Ranks, tmp_path: Path, backend: list[list[Path]], kind: str) -> None:
    found = ranks.run(store_ranks.negotiate_twice, kind, str(tmp_path), path=backend)
    assert found == [[("acme", 3.0)] * 3] * 2


@pytest.mark.parametrize("kind", ["wrapper of a file", "wrapper of TCP"])
def test_a_rank_that_fails_releases_the_others(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    for error, text in ranks.run(store_ranks.abort_at_once, kind, str(tmp_path), [1]):
        assert error == "NegotiationError"
        assert "rank 1" in text
        assert "COMM_CORE_CONTROL_TIMEOUT_S" in text


def test_an_unfit_store_is_refused_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for error, text in ranks.run(store_ranks.get_over_an_unfit_store, str(tmp_path)):
        assert error == "NegotiationError"
        assert "this one (a Unfit) can't do compare_set: " in text


def test_the_process_that_serves_the_store_ends_after_all_know_the_error(ranks: Ranks) -> None:
    first, *others = ranks.run(store_ranks.end_right_after_the_error, world_size=4, dying=[0])
    assert first == DEAD
    for error, text in others:
        assert error == "NegotiationError"
        assert "COMM_CORE_WAIT_TIMEOUT_S differs" in text
