"""Buffers that all ranks map, of the CPU's memory and of a stand-in for the CUDA driver's; threads as ranks."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core import memory
from comm_core._control.channel import SessionChannel
from comm_core._memory.cpu import CpuMemory
from control_ranks import group_of, in_threads
from host_code import CUDA, compiled, needs_compiler

if TYPE_CHECKING:
    from comm_core._control.store import Control

HERE = Path(__file__).parent
NBYTES = (1 << 16) + 7


def context_of(member: Control, channel: Any) -> comm.GroupContext:
    group: Any = None
    ranks = member.global_ranks
    return comm.GroupContext(group, member.rank, member.world_size, torch.device("cpu"), ranks, channel, 1 << 30, 60.0)


def on_ranks(world_size: int, work: Callable[[comm.GroupContext], Any]) -> list[Any]:
    """What `work` returned or raised on each rank, in one Collective hook."""

    def run(member: Control) -> Any:
        channel = SessionChannel()
        with channel.open_stage(member, "hook"):
            return work(context_of(member, channel))

    return in_threads(group_of(dist.HashStore(), world_size, timeout_s=60.0), run)


def used() -> tuple[int, int]:
    """The buffers that this process maps, and its open files."""
    maps = Path("/proc/self/maps").read_text()
    files = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, such as the listing's own
            files += "memfd:comm_core" in str(path.readlink()) or "socket:" in str(path.readlink())
    return maps.count("memfd:comm_core"), files


def check_peers(buffer: memory.SharedBuffer, context: comm.GroupContext, offset: int) -> None:
    """Write this rank's mark into every buffer, and read everyone's marks in this rank's own."""
    for address in buffer.addresses:
        CpuMemory().view(address, buffer.nbytes)[offset + context.rank] = 1 + context.rank
    context.control.barrier()
    marks = buffer.tensor[offset : offset + context.world_size].tolist()
    assert marks == list(range(1, context.world_size + 1))


@pytest.mark.parametrize("world_size", [2, 3, 10, 18])
def test_every_rank_reads_and_writes_every_buffer(world_size: int) -> None:
    def work(context: comm.GroupContext) -> None:
        buffer = memory.share(NBYTES, context, lambda tensor: tensor.fill_(100 + context.rank))
        assert buffer.nbytes == 17 * 4096
        assert buffer.tensor.shape == (buffer.nbytes,)
        assert len(set(buffer.addresses)) == world_size
        seen = [int(CpuMemory().view(address, 1)) for address in buffer.addresses]
        assert seen == [100 + rank for rank in range(world_size)]
        check_peers(buffer, context, NBYTES - 100)
        buffer.close()
        buffer.close()
        assert buffer.addresses == ()

    before = used()
    assert on_ranks(world_size, work) == [None] * world_size
    assert used() == before


def test_a_suspended_buffer_comes_back_at_the_same_addresses() -> None:
    def work(context: comm.GroupContext) -> None:
        buffer = memory.share(NBYTES, context, lambda tensor: tensor.fill_(7))
        addresses = buffer.addresses
        for offset in (0, 50, 100):
            check_peers(buffer, context, offset)
            context.control.barrier()
            buffer.suspend()
            buffer.suspend()
            assert buffer.addresses == addresses
            with pytest.raises(comm.CommError, match="it has no memory"):
                buffer.tensor.zero_()
            context.control.barrier()
            # The ranks are threads: none of them maps a buffer any more.
            assert used()[0] == before[0]
            context.control.barrier()
            buffer.resume()
            assert buffer.addresses == addresses
            assert (buffer.tensor == 7).all()
            with pytest.raises(comm.CommError, match="in use"):
                buffer.resume()
            context.control.barrier()  # a peer may write from here on
        buffer.close()
        with pytest.raises(comm.CommError, match="closed"):
            buffer.resume()

    before = used()
    assert on_ranks(3, work) == [None] * 3
    assert used() == before


def test_fifty_buffers_leave_nothing_behind() -> None:
    def work(context: comm.GroupContext) -> None:
        for _ in range(50):
            memory.share(1 << 20, context).close()

    before = used()
    assert on_ranks(2, work) == [None] * 2
    assert used() == before


class Faulty(CpuMemory):
    """Raises in the n-th call of one method."""

    def __init__(self, method: str, call: int) -> None:
        super().__init__()
        self._original = getattr(self, method)
        self._left = call
        setattr(self, method, self._raise)

    def _raise(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("no more of it today")
        return self._original(*arguments)


STEPS = [
    *((method, 1) for method in ("create", "view", "export")),
    *(("map", call) for call in (1, 2, 3)),
    *(("import_", call) for call in (1, 2)),
]


@pytest.mark.parametrize(
    ("method", "call", "resumed"),
    [
        *(("reserve", call, False) for call in (1, 3)),  # once, for good
        *((method, call, resumed) for method, call in STEPS for resumed in (False, True)),
    ],
)
def test_a_step_that_fails_on_one_rank_fails_on_all_and_nothing_stays(method: str, call: int, resumed: bool) -> None:
    calls = {"map": 3, "import_": 2}.get(method, 1)  # in a group of three

    def work(context: comm.GroupContext) -> None:
        device = Faulty(method, call + calls * resumed) if context.rank == 1 else CpuMemory()
        buffer = memory.SharedBuffer(NBYTES, context, torch.Tensor.zero_, device)
        try:
            buffer.suspend()
            context.control.barrier()
            buffer.resume()
        finally:
            buffer.close()

    before = used()
    results = on_ranks(3, work)
    assert all(isinstance(result, Exception) and "no more of it today" in str(result) for result in results), results
    assert used() == before


def test_buffers_of_different_sizes_are_refused_on_all_ranks() -> None:
    results = on_ranks(3, lambda context: memory.share(4096 << context.rank, context))
    assert {str(result) for result in results} == {
        "the ranks asked for buffers of different sizes, in bytes by rank: [4096, 8192, 16384]"
    }


@pytest.mark.parametrize(("nbytes", "fabric", "words"), [(0, False, "at least 1"), (1, True, "no fabric handles")])
def test_wrong_arguments(nbytes: int, fabric: bool, words: str) -> None:
    results = on_ranks(2, lambda context: memory.share(nbytes, context, fabric=fabric))
    assert all(words in str(result) for result in results)


class Rewritten:
    """A channel that changes what every rank gathers."""

    def __init__(self, channel: Any, rewrite: Callable[[Any], Any]) -> None:
        self._channel, self._rewrite = channel, rewrite
        self.barrier = channel.barrier

    def all_gather(self, value: Any) -> list[Any]:
        return [self._rewrite(each) for each in self._channel.all_gather(value)]


def test_sockets_of_another_network_namespace_are_refused_in_words() -> None:
    def elsewhere(value: Any) -> Any:
        # Nobody has this address here, as none of another namespace's.
        return [b"\0nowhere".hex(), value[1]] if isinstance(value[0], str) else value

    def work(context: comm.GroupContext) -> None:
        memory.share(NBYTES, dataclasses.replace(context, control=Rewritten(context.control, elsewhere)))

    before = used()
    for result in on_ranks(2, work):
        assert re.search(r"socket of rank \d can't be reached.*--network=host", str(result)), result
    assert used() == before


def test_strangers_messages_are_dropped() -> None:
    def disturbed(value: Any) -> Any:
        if isinstance(value[0], str):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
                for message in (b"", b"x" * 33, b"0" * 32 + b"1", value[1].encode(), value[1].encode() + b"one"):
                    stranger.sendmsg([message], rights, 0, bytes.fromhex(value[0]))
        return value

    def work(context: comm.GroupContext) -> None:
        # On the first rank alone: its peer's socket holds few messages, and this is the peer's, too.
        rewrite = disturbed if context.rank == 0 else (lambda value: value)
        buffer = memory.share(NBYTES, dataclasses.replace(context, control=Rewritten(context.control, rewrite)))
        check_peers(buffer, context, 0)
        buffer.close()

    assert on_ranks(2, work) == [None] * 2


def test_the_reason_why_gpus_cant_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.missing() is None
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    assert "pip install 'comm-core[memory]'" in str(memory.missing())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that stands for the CUDA driver."""
    needs_compiler()
    if not (CUDA / "cuda.h").is_file():
        pytest.skip(f"there are no CUDA headers in {CUDA} on this machine")
    folder = tmp_path_factory.mktemp("driver")
    compiled(folder, "-shared", "-fPIC", HERE / "fake_cuda.cpp", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1")
    return folder / "libcuda.so.1"


def test_memory_of_the_cuda_driver(driver: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(driver)}
    command = [sys.executable, HERE / "memory_driver.py", driver]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    expected = [f"{part}: 0 are open" for part in ("shared", "fabric", "refusals")]
    assert (done.stdout.splitlines(), done.returncode) == (expected, 0), done.stderr
