"""The host side of a group's sessions: ranks are threads that share memory of the CPU, with fake native code."""

from __future__ import annotations

import concurrent.futures
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import comm_core as comm
import comm_plugin_customar_v1 as customar_v1
import pytest
import torch
from comm_core import kernel_session
from comm_core._memory.cpu import CpuMemory
from comm_core.tuning import VariantChoice
from comm_plugin_customar_v1 import policy, session

TEST_NBYTES = 65536


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


class Native:
    """One rank's native code, as a module and as the functions of its session."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.algorithms = len(policy.ALGORITHMS)
        self.calls: list[Any] = []
        self.late = 0
        self.fails = ""
        self.stores = True  # whether data that this rank stores at its peers arrives
        self.test_at = 0
        self.buffers: list[int] = []

    def constants(self) -> list[int]:
        return [131328, TEST_NBYTES, self.algorithms]

    def connect(self, *arguments: Any) -> dict[str, Callable[..., Any]]:
        self._step("connect", *arguments)
        self.test_at = arguments[2][0]
        return {name: getattr(self, name) for name in session.Native._fields}

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

    def waits(self) -> list[int]:
        return [0, 0, 0, 3, 4500, 2500]

    def algorithm_of(self, _: int) -> int:
        return 1

    def abort(self) -> None:
        self._step("abort")

    def set_shapes(self, numbers: list[int]) -> None:
        self._step("set_shapes", numbers)

    def attach(self, buffers: list[int], processors: int) -> None:
        self.buffers = buffers
        self._step("attach", processors)

    def write_test_pages(self, seed: int) -> None:
        self._step("write_test_pages")
        for owner in range(self.count) if self.stores else [self.rank]:
            self.page_of(owner, self.rank).fill_(seed)

    def read_test_pages(self, seeds: list[int]) -> str:
        self._step("read_test_pages")
        for rank, seed in enumerate(seeds):
            if self.page_of(self.rank, rank).item() != seed:
                return f"1024 of 1024 words that rank {rank} stored here are wrong"
            if self.page_of(rank, rank).item() != seed:
                return f"1024 of 1024 words loaded from rank {rank}'s memory are wrong"
        return ""

    def page_of(self, owner: int, writer: int) -> torch.Tensor:
        """What `writer` stores in the test pages of `owner`: one number."""
        return CpuMemory().view(self.buffers[owner] + self.test_at + 4096 * writer, 8).view(torch.int64)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the devices; returns the list of what is kept until the process ends."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132 - device.index)
    )
    kept: list[Any] = []
    monkeypatch.setattr(kernel_session, "_kept_until_exit", kept)
    return kept


def test_the_fake_has_the_functions_of_the_native_code() -> None:
    source = Path(customar_v1.__file__).with_name("csrc") / "customar_v1.cu"
    assert tuple(re.findall(r'{"(\w+)", Function::FromTyped', source.read_text())) == session.Native._fields


def mapped() -> int:
    """The number of buffers that this process, which has all ranks, maps."""
    return Path("/proc/self/maps").read_text().count("memfd:comm_core")


def on_all(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Calls `work(rank)` in a thread for each rank; returns what each call returned or raised."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, rank) for rank in range(count)]
        return [future.exception(60) or future.result() for future in futures]


def connect_all(natives: list[Native], forced: policy.Row | None = None) -> list[Any]:
    """Every rank's session, or the exception that `connect` raised."""
    count = len(natives)
    exchange = Exchange(count)

    def connect(rank: int) -> session.Session:
        group, control = cast("Any", object()), cast("Any", Control(rank, exchange))
        jobs = tuple(range(4, 4 + count))
        context = comm.GroupContext(group, rank, count, torch.device("cpu", rank), jobs, control, 64 << 20, 3.0)
        try:
            return session.connect(natives[rank], forced, context)
        except BaseException:
            exchange.abort()
            raise

    return on_all(count, connect)


@pytest.fixture
def pair() -> Iterator[tuple[list[Native], list[Any]]]:
    """The native code and the sessions of two ranks, which are closed at the end."""
    natives = [Native(rank, 2) for rank in range(2)]
    sessions = connect_all(natives)
    yield natives, sessions
    for each in sessions:
        each.buffer.close()


def check_first_contents(native: Native, nbytes: int) -> None:
    """All flags are 0 in this rank's buffer, and the counter is at its first epoch."""
    buffer = CpuMemory().view(native.buffers[native.rank], nbytes)
    assert buffer[:8].view(torch.int64).item() == 1 << 20
    assert not buffer[8 : native.test_at].any()


@pytest.mark.parametrize("count", [2, 4])
def test_buffers_are_shared_tested_and_given_back(count: int) -> None:
    before = mapped()
    natives = [Native(rank, count) for rank in range(count)]
    sessions = connect_all(natives)
    assert mapped() == before + count * count
    for rank, native in enumerate(natives):
        name, *arguments = native.calls[0]
        assert (name, *arguments[:2], arguments[3:]) == ("connect", rank, count, [3.0, rank])
        test_at, staging_at, staging_nbytes = arguments[2]
        assert sessions[rank].memory_nbytes == 18 << 20
        assert test_at + TEST_NBYTES <= staging_at <= (18 << 20) - 2 * staging_nbytes
        # The fewest multiprocessors of all ranks.
        steps = [("attach", 133 - count), ("write_test_pages",), ("read_test_pages",)]
        assert native.calls[1:] == [("set_shapes", policy.flat(policy.rows_for(count))), *steps]
        check_first_contents(native, 18 << 20)
    # No rank waits for another one.
    for own in sessions:
        own.close(True)
    assert mapped() == before
    for own in sessions:
        customar_v1.close(own, True)
        customar_v1.check(own)


def test_a_suspended_session_comes_back_at_the_same_addresses(pair: tuple[list[Native], list[Any]]) -> None:
    natives, sessions = pair
    before = mapped()
    for native in natives:
        CpuMemory().view(native.buffers[native.rank], 18 << 20).fill_(7)  # launches have counted and set flags
    for own in sessions:
        customar_v1.suspend(own)
    assert mapped() == before - 4
    assert on_all(2, lambda rank: customar_v1.resume(sessions[rank])) == [None] * 2
    assert mapped() == before
    for native, own in zip(natives, sessions, strict=True):
        assert list(own.buffer.addresses) == native.buffers
        assert native.calls[-1] == ("read_test_pages",), "access was tested once"
        check_first_contents(native, 18 << 20)


@pytest.mark.parametrize("fails", ["connect", "set_shapes", "attach", "write_test_pages", "read_test_pages"])
def test_a_failure_on_one_rank_leaves_nothing_on_any(fails: str, kept: list[Any]) -> None:
    before = mapped()
    natives = [Native(rank, 4) for rank in range(4)]
    natives[2].fails = fails
    errors = connect_all(natives)
    if "test_pages" in fails:
        failed = [f"rank 2 (6 in the job): {fails} fails here"] * 4
    else:
        failed = [f"{fails} fails here" if rank == 2 else "another rank failed" for rank in range(4)]
    assert [str(error) for error in errors] == failed
    assert (mapped(), kept) == (before, [])


@pytest.mark.parametrize("call", [1, 2])
def test_a_rank_that_cant_map_a_buffer_leaves_nothing_on_any(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own buffer, which it maps first, or its peer's."""
    before, map_ = mapped(), CpuMemory.map
    lock, calls = threading.Lock(), list[int]()

    def refuse(self: CpuMemory, address: int, nbytes: int, handle: int) -> None:
        with lock:
            calls.append(threading.get_ident())
            fails = calls[-1] == calls[0] and calls.count(calls[0]) == call
        if fails:
            raise OSError("no more of it today")
        map_(self, address, nbytes, handle)

    monkeypatch.setattr(CpuMemory, "map", refuse)
    natives = [Native(rank, 2) for rank in range(2)]
    errors = connect_all(natives)
    assert sorted(str(error) for error in errors) == ["another rank failed", "no more of it today"]
    assert all([name for name, *_ in native.calls] == ["connect", "set_shapes"] for native in natives)
    assert mapped() == before


def test_wrong_data_is_an_error_on_all_ranks(kept: list[Any]) -> None:
    before = mapped()
    natives = [Native(rank, 2) for rank in range(2)]
    natives[0].stores = False
    reason = "rank 1 (5 in the job): the driver reports peer access, but 1024 of 1024 words that rank 0 stored here"
    assert all(str(error).startswith(reason) for error in connect_all(natives))
    assert (mapped(), kept) == (before, [])


def test_native_code_of_another_version_is_refused_before_the_exchange() -> None:
    before = mapped()
    natives = [Native(rank, 2) for rank in range(2)]
    natives[0].algorithms = 3
    errors = connect_all(natives)
    assert "another version" in str(errors[0])
    assert natives[0].calls == []
    assert mapped() == before


def test_after_a_failure_no_rank_waits_and_nothing_is_freed(
    pair: tuple[list[Native], list[Any]], kept: list[Any]
) -> None:
    natives, sessions = pair
    before = mapped()
    for _ in range(2):
        customar_v1.close(sessions[0], False)
    assert natives[0].calls[-1] == ("abort",)
    assert mapped() == before
    assert len(kept) == 1
    customar_v1.check(sessions[0])


def test_the_hot_path(pair: tuple[list[Native], list[Any]]) -> None:
    own = pair[1][0]
    x = torch.ones(8)
    assert torch.equal(customar_v1.all_reduce(own, x, None), x * 2)
    assert customar_v1.all_reduce(own, x, x) is x
    assert torch.equal(x, torch.full((8,), 2.0))
    assert own.algorithm_of(16) == "two_stage"


def test_a_kernel_that_timed_out_names_the_rank(pair: tuple[list[Native], list[Any]]) -> None:
    native, own = pair[0][0], pair[1][0]
    customar_v1.check(own)
    native.late = 2
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


def test_waits_are_by_peer_in_microseconds_until_the_session_is_closed(pair: tuple[list[Native], list[Any]]) -> None:
    own = pair[1][0]
    assert customar_v1.waits(own) == {1: (3, 4.5, 2.5)}
    own.suspend()
    customar_v1.abort(own)
    assert customar_v1.waits(own) == {1: (3, 4.5, 2.5)}
    customar_v1.close(own, True)
    assert customar_v1.waits(own) == {}


def test_after_abort_check_reports_replays_alone(pair: tuple[list[Native], list[Any]]) -> None:
    native, own = pair[0][0], pair[1][0]
    native.late = 2
    customar_v1.abort(own)
    customar_v1.abort(own)
    assert native.calls.count(("abort",)) == 2
    for _ in range(2):
        customar_v1.check(own)  # the time-out was reported before
    for launches in (1, 3):
        own.buffer.tensor[:8].view(torch.int64).add_(launches << 20)  # as kernels do
        with pytest.raises(comm.CommError, match="in the replay of a graph"):
            customar_v1.check(own)
        customar_v1.check(own)
    customar_v1.close(own, True)
    customar_v1.abort(own)
    customar_v1.check(own)


def test_a_forced_row_reaches_the_native_code_and_stays() -> None:
    row = policy.Row(8 << 20, "two_stage", 2, 64, 7)
    natives = [Native(rank, 2) for rank in range(2)]
    for own in connect_all(natives, row):
        known = len(natives[0].calls)
        assert len(customar_v1.variants(own, "all_reduce", 8192, 0)) < 2
        customar_v1.use_variants(own, (VariantChoice("all_reduce", "one_stage"),))
        assert len(natives[0].calls) == known
        own.close(True)
    assert natives[1].calls[1] == ("set_shapes", [8 << 20, 1, 2, 64, 7])


def test_chosen_variants_reach_the_native_code_and_leave_it(pair: tuple[list[Native], list[Any]]) -> None:
    (native, _), (own, _) = pair
    before = customar_v1.variants(own, "all_reduce", 8192, 0)
    choices = (VariantChoice("all_reduce", before[1]),)
    customar_v1.use_variants(own, choices)
    assert native.calls[-1] == ("set_shapes", policy.flat(policy.with_choices(policy.rows_for(2), 2, choices)))
    assert customar_v1.variants(own, "all_reduce", 8192, 0)[0] == before[1]
    with pytest.raises(ValueError, match="isn't one of one_stage, two_stage"):
        customar_v1.use_variants(own, (VariantChoice("all_reduce", "ring"),))
    customar_v1.use_variants(own, ())
    assert native.calls[-1] == ("set_shapes", policy.flat(policy.rows_for(2)))
    assert customar_v1.variants(own, "all_reduce", 8192, 0) == before
