"""The host side of a group's sessions: ranks are threads, over a fake driver."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import comm_core as comm
import comm_plugin_customar_v1 as customar_v1
import pytest
import torch
from comm_plugin_customar_v1 import policy, session, teardown

FUNCTIONS = (
    *("all_reduce", "all_reduce_out", "error", "algorithm_of", "abort", "set_shapes", "ipc_handle", "open_peers"),
    *("write_test_pages", "read_test_pages", "unmap_peers", "free"),
)


class Exchange:
    """The ranks' messages: a step succeeds once every rank has come to it; after a failure no step does."""

    def __init__(self, count: int) -> None:
        self.count, self.failed = count, False
        self.changed = threading.Condition()
        self.messages: dict[int, dict[int, Any]] = {}

    def gather(self, step: int, rank: int, value: Any) -> list[Any]:
        with self.changed:
            messages = self.messages.setdefault(step, {})
            if not self.failed:
                messages[rank] = value
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.failed or len(messages) == self.count, 60)
            if len(messages) < self.count:
                raise comm.CommError("another rank failed")
            return [messages[rank] for rank in range(self.count)]

    def abort(self) -> None:
        with self.changed:
            self.failed = True
            self.changed.notify_all()


class Control:
    """One rank's control channel."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        self.rank, self.exchange, self.step = rank, exchange, 0

    def all_gather(self, value: Any) -> list[Any]:
        self.step += 1
        return self.exchange.gather(self.step, self.rank, value)

    def barrier(self) -> None:
        self.all_gather(None)

    def agree(self, ok: bool, reason: str = "") -> comm.Agreement:
        votes = self.all_gather(None if ok else reason)
        reasons = {rank: why for rank, why in enumerate(votes) if why is not None}
        return comm.Agreement(not reasons, reasons)


class Driver:
    """All ranks' memory: which buffers are allocated and open, and the seeds of the pages written to them."""

    def __init__(self, count: int) -> None:
        self.lock = threading.Lock()
        self.allocated: set[int] = set()
        self.open: list[tuple[int, int]] = []  # (rank, owner of the buffer)
        self.seeds: dict[tuple[int, int], int] = {}  # by (owner of the buffer, writer)
        self.natives = [Native(self, rank, count) for rank in range(count)]


class Native:
    """One rank's native code, as a module and as the functions of its session."""

    def __init__(self, driver: Driver, rank: int, count: int) -> None:
        self.driver, self.rank, self.count = driver, rank, count
        self.algorithms = len(policy.ALGORITHMS)
        self.calls: list[Any] = []
        self.late = 0
        self.fails = ""

    def constants(self) -> list[int]:
        return [131328, 65536, self.algorithms]

    def connect(self, *arguments: Any) -> dict[str, Callable[..., Any]]:
        self.calls.append(("connect", *arguments))
        self.driver.allocated.add(self.rank)
        return {name: getattr(self, name) for name in FUNCTIONS}

    def _step(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if self.fails == name:
            raise RuntimeError(f"{name} fails here")

    def all_reduce_out(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        if self.late:
            raise RuntimeError("a kernel timed out")
        out.copy_(tensor * 2)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.all_reduce_out(tensor, out := torch.empty_like(tensor))
        return out

    def error(self) -> int:
        return self.late

    def algorithm_of(self, _: int) -> int:
        return 1

    def abort(self) -> None:
        self._step("abort")

    def set_shapes(self, numbers: list[int]) -> None:
        self._step("set_shapes", numbers)

    def ipc_handle(self) -> bytes:
        return bytes([self.rank]) * 64

    def open_peers(self, handles: list[bytes], processors: int) -> None:
        with self.driver.lock:
            for rank, handle in enumerate(handles):
                assert handle == bytes([rank]) * 64, "by group rank"
                if rank != self.rank:
                    self.driver.open.append((self.rank, rank))
        self._step("open_peers", processors)

    def write_test_pages(self, seed: int) -> None:
        for rank in range(self.count):
            assert rank in self.driver.allocated
            self.driver.seeds[rank, self.rank] = seed
        self._step("write_test_pages")

    def read_test_pages(self, seeds: list[int]) -> str:
        self._step("read_test_pages")
        for rank in range(self.count):
            for owner in (self.rank, rank):
                if self.driver.seeds[owner, rank] != seeds[rank]:
                    return f"1024 of 1024 words loaded from rank {rank}'s memory are wrong"
        return ""

    def unmap_peers(self) -> None:
        self._step("unmap_peers")
        with self.driver.lock:
            self.driver.open = [pair for pair in self.driver.open if pair[0] != self.rank]

    def free(self) -> None:
        self._step("free")
        with self.driver.lock:
            assert not [pair for pair in self.driver.open if pair[1] == self.rank], "a peer has it mapped"
            self.driver.allocated.remove(self.rank)


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Replaces the device and the folder of the pages; returns the list of what is kept until the process ends."""
    monkeypatch.setattr(teardown, "_FOLDER", tmp_path)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132 - device.index)
    )
    kept: list[Any] = []
    monkeypatch.setattr(session, "_kept_until_exit", kept)
    return kept


def test_the_fake_has_the_functions_of_the_native_code() -> None:
    source = Path(customar_v1.__file__).with_name("csrc") / "customar_v1.cu"
    assert tuple(re.findall(r'{"(\w+)", Function::FromTyped', source.read_text())) == FUNCTIONS


def on_all(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Calls `work(rank)` in a thread for each rank; returns what each call returned or raised."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank) for rank in range(count)]
        return [future.exception(60) or future.result() for future in futures]


def connect_all(driver: Driver, forced: policy.Row | None = None) -> list[Any]:
    """Every rank's session, or the exception that `connect` raised."""
    count = len(driver.natives)
    exchange = Exchange(count)

    def connect(rank: int) -> session.Session:
        native, group, control = driver.natives[rank], cast("Any", object()), cast("Any", Control(rank, exchange))
        jobs = tuple(range(4, 4 + count))
        context = comm.GroupContext(group, rank, count, torch.device("cuda", rank), jobs, control, 64 << 20, 3.0)
        try:
            return session.connect(native, forced, context)
        except BaseException:
            exchange.abort()
            raise

    return on_all(count, connect)


@pytest.mark.parametrize("count", [2, 4])
def test_handles_are_opened_once_by_rank_and_given_back_in_order(count: int, tmp_path: Path) -> None:
    driver = Driver(count)
    sessions = connect_all(driver)
    assert sorted(driver.open) == [(rank, owner) for rank in range(count) for owner in range(count) if rank != owner]
    for rank, native in enumerate(driver.natives):
        name, *arguments = native.calls[0]
        nbytes = sessions[rank].memory_nbytes
        assert (name, *arguments[:2], arguments[2][0], arguments[3:]) == ("connect", rank, count, nbytes, [3.0, rank])
        # The fewest multiprocessors of all ranks.
        steps = [("open_peers", 133 - count), ("write_test_pages",), ("read_test_pages",)]
        assert native.calls[1:] == [("set_shapes", policy.flat(policy.rows_for(count))), *steps]
    assert list(tmp_path.iterdir()) == []
    assert on_all(count, lambda rank: sessions[rank].close(True)) == [None] * count
    assert (driver.open, driver.allocated) == ([], set())
    for rank in range(count):
        customar_v1.close(sessions[rank], True)
        customar_v1.check(sessions[rank])


@pytest.mark.parametrize("fails", ["set_shapes", "open_peers", "write_test_pages", "read_test_pages"])
def test_a_failure_on_one_rank_leaves_nothing_on_any(fails: str, no_device: list[Any], tmp_path: Path) -> None:
    driver = Driver(4)
    driver.natives[2].fails = fails
    errors = connect_all(driver)
    if fails == "set_shapes":
        failed = [f"{fails} fails here" if rank == 2 else "another rank failed" for rank in range(4)]
    else:
        failed = [f"rank 2 (6 in the job): {fails} fails here"] * 4
    assert [str(error) for error in errors] == failed
    # No rank waited until a peer timed out, and kept its buffer.
    assert (driver.open, driver.allocated, no_device, list(tmp_path.iterdir())) == ([], set(), [], [])


def test_wrong_data_is_an_error_on_all_ranks(no_device: list[Any]) -> None:
    driver = Driver(2)

    class Lost(dict[tuple[int, int], int]):
        """Rank 0's stores to rank 1 get lost."""

        def __setitem__(self, key: tuple[int, int], seed: int) -> None:
            super().__setitem__(key, -1 if key == (1, 0) else seed)

    driver.seeds = Lost()
    reason = "rank 1 (5 in the job): the driver reports peer access, but 1024 of 1024 words"
    assert all(str(error).startswith(reason) for error in connect_all(driver))
    assert (driver.open, driver.allocated, no_device) == ([], set(), [])


def test_native_code_of_another_version_is_refused_before_it_allocates() -> None:
    driver = Driver(2)
    driver.natives[0].algorithms = 3
    errors = connect_all(driver)
    assert "another version" in str(errors[0])
    assert 0 not in driver.allocated
    assert driver.allocated == set()


def test_no_rank_waits_if_one_rank_cant_open_the_page(
    monkeypatch: pytest.MonkeyPatch, no_device: list[Any], tmp_path: Path
) -> None:
    real = teardown.UnmapFlags

    def open_page(token: str, rank: int, world_size: int) -> teardown.UnmapFlags:
        if rank == 1:
            raise PermissionError("not mine")
        return real(token, rank, world_size)

    monkeypatch.setattr(teardown, "UnmapFlags", open_page)
    # A rank that waited for rank 1's flag would wait forever.
    monkeypatch.setattr(session, "UNMAP_TIMEOUT_S", 1e6)
    driver = Driver(2)
    errors = connect_all(driver)
    assert str(errors[1]) == "not mine"
    assert (driver.open, driver.allocated, no_device, list(tmp_path.iterdir())) == ([], set(), [], [])


def test_a_buffer_that_a_peer_still_has_mapped_is_kept(monkeypatch: pytest.MonkeyPatch, no_device: list[Any]) -> None:
    monkeypatch.setattr(session, "UNMAP_TIMEOUT_S", 0.05)
    driver = Driver(2)
    sessions = connect_all(driver)
    with pytest.raises(comm.CommError, match=r"still mapped by rank 1 \(5 in the job\)"):
        sessions[0].close(True)
    assert driver.allocated == {0, 1}
    assert driver.open == [(1, 0)]
    assert len(no_device) == 1
    # The late rank finds all flags set.
    sessions[1].close(True)
    assert driver.allocated == {0}


def test_after_a_failure_no_rank_waits_and_nothing_is_freed(no_device: list[Any]) -> None:
    driver = Driver(2)
    sessions = connect_all(driver)
    for _ in range(2):
        customar_v1.close(sessions[0], False)
    assert driver.natives[0].calls[-1] == ("abort",)
    assert driver.allocated == {0, 1}
    assert len(no_device) == 1
    customar_v1.check(sessions[0])


def test_the_hot_path() -> None:
    driver = Driver(2)
    own = connect_all(driver)[0]
    x = torch.ones(8)
    assert torch.equal(customar_v1.all_reduce(own, x, None), x * 2)
    assert customar_v1.all_reduce(own, x, x) is x
    assert torch.equal(x, torch.full((8,), 2.0))
    assert own.algorithm_of(16) == "two_stage"


def test_a_kernel_that_timed_out_names_the_rank() -> None:
    driver = Driver(2)
    own = connect_all(driver)[0]
    customar_v1.check(own)
    driver.natives[0].late = 2
    for call in (
        lambda: customar_v1.check(own),
        lambda: customar_v1.all_reduce(own, torch.ones(8), None),
        lambda: customar_v1.all_reduce(own, torch.ones(8), torch.ones(8)),
    ):
        with pytest.raises(
            comm.CommTimeoutError, match=r"rank 1 \(5 in the job\) didn't come within 3 s, or called with another"
        ) as caught:
            call()
        assert caught.value.ranks == (1,)


def test_a_forced_row_reaches_the_native_code() -> None:
    row = policy.Row(8 << 20, "two_stage", 2, 64, 7)
    driver = Driver(2)
    connect_all(driver, row)
    assert driver.natives[1].calls[1] == ("set_shapes", [8 << 20, 1, 2, 64, 7])


def test_a_page_is_private_and_other_tokens_are_refused(tmp_path: Path) -> None:
    token = teardown.create()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    flags = [teardown.UnmapFlags(token, rank, 2) for rank in range(2)]
    teardown.remove(token)
    teardown.remove(token)
    assert not path.exists()
    flags[1].set()
    assert flags[0].wait(0.0) == (0,)
    flags[0].set()
    assert flags[1].wait(60.0) == ()
    with pytest.raises(FileNotFoundError):
        teardown.UnmapFlags(token, 0, 2)
    with pytest.raises(ValueError, match="isn't a token"):
        teardown.UnmapFlags("../x", 0, 2)


def test_without_space_no_page_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no space"):
        teardown.create()
    assert list(tmp_path.iterdir()) == []
