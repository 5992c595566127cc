"""The backend in real processes: sums are exact, waits are bounded, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import DEAD, Ranks, install, side_store

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)
# Around the sizes of vectors, pages and the protocol's chunks and thresholds.
SIZES = (1, 3, 4095, 4096, 4097, 16 << 10, (512 << 10) - 8, 512 << 10, (512 << 10) + 8, (1 << 20) + 40)


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """A folder in which ranks find this plugin alone."""
    return install(tmp_path, "shm", "import comm_plugin_shm as plugin\n")


def left_behind() -> set[str]:
    # Other programs come and go there, too.
    return {path.name for path in Path("/dev/shm").iterdir() if "comm" in path.name}  # noqa: S108 - only read


def random_bits(rank: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's input: random bits, so that floating-point inputs have numbers, infinities and NaNs of every kind."""
    generator = torch.Generator().manual_seed(rank * 1_000_003 + nbytes)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-nbytes // 8),), dtype=torch.int64, generator=generator)
    return words.view(dtype)[: -(-nbytes // dtype.itemsize)]


def reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum from left to right; half precisions in float32, rounded once."""
    dtype = tensors[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = tensors[0].to(wide)
    for tensor in tensors[1:]:
        total = total + tensor.to(wide)
    return total.to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, except that any NaN equals any NaN."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    numbers = ~one.isnan()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.view(bits)[numbers], other.view(bits)[numbers])


def backend_of_shm(group: dist.ProcessGroup | None = None) -> comm.Backend:
    backend = comm.get_backend(group, backends=("shm",))
    assert backend.name == "shm"
    return backend


def sums(sizes: tuple[int, ...]) -> None:
    backend = backend_of_shm()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for number, dtype in enumerate(DTYPES):
        assert backend.all_reduce(torch.empty(0, 5, dtype=dtype)).shape == (0, 5)
        # Of the other dtypes, each size goes with several.
        for nbytes in sizes if dtype in (torch.float32, torch.bfloat16) else sizes[number % 3 :: 3]:
            inputs = [random_bits(r, nbytes, dtype) for r in range(world_size)]
            expected = reference(inputs)
            mine = inputs[rank].clone()
            result = backend.all_reduce(mine)
            assert same(result, expected), (dtype, nbytes)
            assert same(mine, inputs[rank]), "the input changed"
            assert backend.all_reduce(mine, out=mine) is mine
            assert same(mine, expected), (dtype, nbytes, "in place")
    square = torch.arange(60).reshape(6, 10) + rank
    expected = (torch.arange(60).reshape(6, 10) * world_size + sum(range(world_size))).t()
    assert torch.equal(backend.all_reduce(square.t()), expected)
    strided = torch.empty(20, 6, dtype=torch.int64)[::2]
    assert backend.all_reduce(square.t(), out=strided) is strided
    assert torch.equal(strided, expected)
    comm.close()


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_every_sum_has_the_bits_of_the_reference(ranks: Ranks, shm: Path, world_size: int) -> None:
    ranks.run(sums, SIZES, world_size=world_size, path=[[shm]] * world_size, deadline_s=280)


def reads_before_yielding(processors: list[list[int]]) -> int:
    """What the native code of a handle gets, if each rank may use these processors."""
    from comm_plugin_shm import session

    given: list[int] = []

    def connect(module: Any, context: comm.GroupContext) -> Any:
        def native(*arguments: Any) -> Any:
            given.append(arguments[-1])
            return module.connect(*arguments)

        spy = types.SimpleNamespace(segment_nbytes=module.segment_nbytes, connect=native)
        return stock(spy, context)

    stock = session.connect
    mine = set(processors[dist.get_rank()])
    with mock.patch.object(session, "connect", connect), mock.patch("os.sched_getaffinity", return_value=mine):
        backend_of_shm()
    comm.close()
    (number,) = given
    return number


def test_ranks_that_have_processors_of_their_own_yield_later(ranks: Ranks, shm: Path) -> None:
    """As in engines that pin each rank to its own, where each sees one processor alone."""
    shared, own = 20, 2000
    for processors, expected in (([[0], [1]], own), ([[1], [1]], shared), ([[0, 1], [0, 1]], own)):
        found = ranks.run(reads_before_yielding, processors, path=[[shm]] * 2)
        assert found == [expected] * 2, processors


def large() -> None:
    backend = backend_of_shm()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    inputs = [random_bits(r, 64 << 20, torch.float32) for r in range(world_size)]
    assert same(backend.all_reduce(inputs[rank]), reference(inputs))
    comm.close()


def test_64_mib(ranks: Ranks, shm: Path) -> None:
    ranks.run(large, path=[[shm]] * 2)


def every_half() -> None:
    """All 65,536 bit patterns of a half precision, against each of several others."""
    backend = backend_of_shm()
    rank = dist.get_rank()
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        for other in (0.0, -0.0, 1.0, -1.0, 65504.0, 6e-8, 3e-5, 1 / 3, float("inf"), float("nan")):
            inputs = [patterns, torch.full_like(patterns, other)]
            assert same(backend.all_reduce(inputs[rank]), reference(inputs)), (dtype, other)
    comm.close()


def test_every_bit_pattern_of_the_half_precisions(ranks: Ranks, shm: Path) -> None:
    ranks.run(every_half, path=[[shm]] * 2)


def soak(calls: int) -> int:
    """Random sizes, dtypes and outputs in two groups of the same ranks; every result is checked."""
    backends = [backend_of_shm(), backend_of_shm(dist.new_group(list(range(dist.get_world_size()))))]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dice = random.Random(5)  # noqa: S311 - dice, the same on every rank
    for call in range(calls):
        dtype = dice.choice(DTYPES)
        numel = int(2 ** dice.uniform(0, 9 if call % 100 else 18))
        factor = dice.randrange(1, 8)
        base = torch.arange(numel) % 13
        x = (base + factor * rank).to(dtype)
        expected = (base * world_size + factor * sum(range(world_size))).to(dtype)
        result = dice.choice(backends).all_reduce(x, out=x if dice.random() < 0.3 else None)
        assert torch.equal(result, expected), (call, dtype, numel)
    comm.close()
    return calls


def test_a_soak(ranks: Ranks, shm: Path) -> None:
    calls = int(os.environ.get("SOAK_CALLS", "5000"))
    assert ranks.run(soak, calls, path=[[shm]] * 2, deadline_s=max(120, calls // 500)) == [calls] * 2


def reruns() -> list[str]:
    backend = backend_of_shm()
    x = torch.randn(70_001, generator=torch.Generator().manual_seed(dist.get_rank())).to(torch.bfloat16)
    results = [backend.all_reduce(x).view(torch.int16).numpy().tobytes().hex() for _ in range(3)]
    comm.close()
    return results


def test_a_rerun_and_every_rank_have_the_same_bits(ranks: Ranks, shm: Path) -> None:
    results = ranks.run(reruns, world_size=3, path=[[shm]] * 3)
    assert len({bits for result in results for bits in result}) == 1


def interrupted_by_death(victim: int) -> dict[str, Any]:
    backend = backend_of_shm()
    x = torch.ones(1000)
    for call in range(1_000_000):
        if dist.get_rank() == victim and call == 1234:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            backend.all_reduce(x)
        except comm.CommTimeoutError as error:
            with pytest.raises(comm.CommError, match="refuses further calls"):
                backend.all_reduce(x)
            comm.close()  # which doesn't wait for the dead
            return {"call": call, "ranks": error.ranks, "text": str(error)}
    raise AssertionError("no call raised")


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (3, 1)])
def test_a_killed_rank_is_named_by_all_others(ranks: Ranks, shm: Path, world_size: int, victim: int) -> None:
    before = left_behind()
    results = ranks.run(interrupted_by_death, victim, world_size=world_size, path=[[shm]] * world_size, dying=[victim])
    assert results[victim] == DEAD
    for result in results[:victim] + results[victim + 1 :]:
        assert result["ranks"] == (victim,), result
        assert f"rank {victim}, process" in result["text"]
        assert "has ended" in result["text"]
        assert result["call"] in (1233, 1234)
    assert left_behind() == before


def late_rank() -> str:
    backend = backend_of_shm()
    x = torch.ones(10)
    backend.all_reduce(x)
    if dist.get_rank() == 1:
        side_store().wait(["raised by 0", "raised by 2"])
    with pytest.raises(comm.CommTimeoutError) as caught:
        backend.all_reduce(x)
    side_store().set(f"raised by {dist.get_rank()}", "")
    assert caught.value.ranks == (1,)
    return str(caught.value)


def test_a_late_rank_is_named_by_all(ranks: Ranks, shm: Path) -> None:
    results = ranks.run(late_rank, world_size=3, path=[[shm]] * 3, env={"COMM_CORE_WAIT_TIMEOUT_S": "1"})
    assert all("didn't come within 1 s" in text for text in results)


def interrupted_by_a_signal() -> str:
    backend = backend_of_shm()
    if dist.get_rank() == 0:
        # Python's own handler, which a background job of a shell starts without.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            backend.all_reduce(torch.ones(10))
        side_store().set("interrupted", "")
        return "interrupted"
    side_store().wait(["interrupted"])
    with pytest.raises(comm.CommError, match=r"rank 0 stopped after a failure.*KeyboardInterrupt"):
        backend.all_reduce(torch.ones(10))
    return "raised"


def test_a_wait_can_be_interrupted_and_the_other_ranks_raise(ranks: Ranks, shm: Path) -> None:
    assert ranks.run(interrupted_by_a_signal, path=[[shm]] * 2) == ["interrupted", "raised"]


# A rank dies when it reaches the step that `VICTIM` names, while the ranks connect.
DYING = """
import os, signal
import comm_plugin_shm as plugin
from comm_plugin_shm import session

def dying(step):
    def die(*arguments, **keywords):
        if os.environ.get("VICTIM") == step.__name__:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **keywords)

    return die

for name in {steps!r}:
    setattr(session, name, dying(getattr(session, name)))
"""
STEPS = ("_create", "_open", "Session")


def connecting() -> str:
    """Connect in pairs; the first rank of each dies."""
    first = dist.get_rank() // 2 * 2
    pairs = [dist.new_group([rank, rank + 1]) for rank in range(0, dist.get_world_size(), 2)]
    pair = pairs[first // 2]
    assert isinstance(pair, dist.ProcessGroup)
    with pytest.raises(comm.CommTimeoutError, match=r"rank 0 .*didn't come in time") as caught:
        comm.get_backend(pair)
    assert caught.value.ranks == (0,)
    return "raised"


def test_a_rank_killed_while_it_connects_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path, "shm", DYING.format(steps=STEPS))
    before = left_behind()
    # A short deadline, since the others wait for it.
    deadline = {"COMM_CORE_CONNECT_TIMEOUT_S": "5"}
    env = [{**deadline, "VICTIM": step if dies else ""} for step in STEPS for dies in (True, False)]
    results = ranks.run(connecting, world_size=6, path=[[folder]] * 6, env=env, dying=[0, 2, 4])
    assert results[::2] == [DEAD] * 3
    assert results[1::2] == ["raised"] * 3
    assert left_behind() == before


def held_resources() -> list[tuple[int, int]]:
    """Numbers of the plugin's mappings and descriptors: before three sessions, and during and after each."""

    def count() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("memfd:comm-plugin-shm")
        # Of the shared memory and of the watched peers. Others come and go, such as the store's connections.
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile, such as the listing's own
                links.append(str(path.readlink()))
        return maps, sum("memfd:comm-plugin-shm" in link or "pidfd" in link for link in links)

    counts = [count()]
    for _ in range(3):
        backend_of_shm()
        counts.append(count())
        comm.close()
        counts.append(count())
    return counts


def test_close_gives_back_the_mapping_and_the_descriptors(ranks: Ranks, shm: Path) -> None:
    assert ranks.run(held_resources, path=[[shm]] * 2) == [[(0, 0), *[(1, 1), (0, 0)] * 3]] * 2


def over_budget() -> tuple[str, str]:
    candidate = comm.get_backend().decision.candidate("shm")
    assert candidate is not None
    comm.close()
    return candidate.verdict, candidate.reason


def test_a_budget_that_is_too_small_drops_the_backend(ranks: Ranks, shm: Path) -> None:
    for verdict, reason in ranks.run(over_budget, path=[[shm]] * 2, env={"COMM_CORE_MEMORY_BUDGET_NBYTES": "1000"}):
        assert verdict == "failed"
        assert "1000" in reason


def be_late() -> dict[str, Any]:
    """Rank 1 comes late to calls, until every rank has seen that, or it has been late 100 times."""
    backend = comm.get_backend()
    first = backend.waits()
    for _ in range(100):
        if dist.get_rank() == 1:
            time.sleep(0.05)
        backend.all_reduce(torch.ones(8))
        seen = {item.rank: item.longest_us for item in backend.waits()}
        is_seen = torch.tensor(dist.get_rank() == 1 or seen.get(1, 0) >= 20_000)
        dist.all_reduce(is_seen, dist.ReduceOp.MIN)
        if is_seen:
            break
    waits, explained = backend.waits(), backend.explain()
    comm.close()
    return {"first": first, "waits": waits, "explained": explained, "closed": backend.waits()}


def test_a_late_rank_is_named_by_the_waits_of_the_others(ranks: Ranks, shm: Path) -> None:
    found = ranks.run(be_late, path=[[shm]] * 3, world_size=3)
    for rank, each in enumerate(found):
        by_peer = {item.rank: item for item in each["waits"]}
        assert rank not in by_peer
        assert all(item.backend == "shm" for item in (*each["first"], *each["waits"]))
        for item in each["waits"]:
            assert item.waits > 0
            assert item.waits * item.longest_us >= item.total_us >= item.longest_us > 0
        before = {item.rank: item for item in each["first"]}  # of the admission test
        assert all(by_peer[peer].waits >= item.waits for peer, item in before.items())
        assert each["closed"] == ()
        if rank != 1:
            assert by_peer[1].longest_us >= 20_000
            assert "waited for" in each["explained"]
            assert "rank 1" in each["explained"]
