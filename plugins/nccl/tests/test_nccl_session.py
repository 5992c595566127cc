"""One session over a fake of nccl4py's module; the peer is a process that can end."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comm_core as comm
import comm_plugin_nccl as nccl
import pytest
import torch
from comm_plugin_nccl import peers, policy, session
from made_up_topologies import ELSEWHERE, HERE
from nccl_ranks import Binding, NCCLError, wait_for


class Recording(Binding):
    """Records calls, and sums nothing."""

    def all_reduce(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def peer() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def connect(
    binding: Binding, peer: subprocess.Popen[bytes], *, host: comm.Host = HERE, process: dict[str, Any] | None = None
) -> session.Session:
    def all_gather(value: dict[str, Any]) -> list[dict[str, Any]]:
        assert bytes.fromhex(value["id"]) == binding.identity
        return [value, value | {"id": "", "pid": peer.pid} | (process or {})]

    topology = comm.Topology.of([comm.RankInfo(4, HERE), comm.RankInfo(7, host)], ("cuda",))
    control: Any = SimpleNamespace(all_gather=all_gather, barrier=lambda: None)
    group: Any = object()
    context = comm.GroupContext(group, 0, 2, torch.device("cpu"), (4, 7), control, 1 << 20, 3.0)
    return session.connect(binding, lambda _: 3, topology, context)  # type: ignore[arg-type]


def abort(own: session.Session) -> None:
    own.close(orderly=False)


def test_a_call_passes_addresses(peer: subprocess.Popen[bytes]) -> None:
    binding = Recording()
    own = connect(binding, peer)
    x, y = torch.ones(6, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.bfloat16)
    assert nccl.all_reduce(own, x, y) is y
    assert nccl.all_reduce(own, x, x) is x
    fresh = nccl.all_reduce(own, x, None)
    targets = (y, x, fresh)
    assert binding.calls[1:] == [(x.data_ptr(), each.data_ptr(), 6, 9, 0, 7, 3) for each in targets]
    assert fresh.data_ptr() != x.data_ptr()
    abort(own)


@pytest.mark.parametrize("dtype", policy.DTYPE_CODES)
def test_preparing_calls_at_every_power_of_two_up_to_the_shapes(
    peer: subprocess.Popen[bytes], dtype: torch.dtype
) -> None:
    binding = Recording()
    own = connect(binding, peer)
    assert nccl.pre_capture_init(own, comm.Shapes(3, 100, dtype)) is None
    assert [each[2] for each in binding.calls[1:]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    nccl.pre_capture_init(own, comm.Shapes(1, 1, dtype))
    assert [each[2] for each in binding.calls[11:]] == [1]
    nccl.pre_capture_init(own, comm.Shapes(1, 1, torch.int16))
    assert len(binding.calls) == 12
    abort(own)


@pytest.mark.parametrize("orderly", [True, False])
def test_close_ends_the_communicator_once(peer: subprocess.Popen[bytes], orderly: bool) -> None:
    binding = Recording()
    own = connect(binding, peer)
    nccl.close(own, orderly)
    nccl.close(own, not orderly)
    wait_for(lambda: len(binding.calls) > 1)
    assert binding.calls[1:] == ["destroy" if orderly else "abort"]
    for call in (lambda: nccl.check(own), lambda: nccl.all_reduce(own, torch.ones(3), None)):
        with pytest.raises(comm.CommError, match="its session is closed"):
            call()


@pytest.mark.parametrize("orderly", [True, False])
def test_a_handle_that_stops_aborts_the_communicator(peer: subprocess.Popen[bytes], orderly: bool) -> None:
    binding = Recording()
    own = connect(binding, peer)
    for _ in range(2):
        nccl.abort(own)
    wait_for(lambda: len(binding.calls) > 1)
    for call in (lambda: nccl.check(own), lambda: nccl.all_reduce(own, torch.ones(3), None)):
        with pytest.raises(comm.CommError, match="this rank's handle has stopped"):
            call()
    nccl.close(own, orderly)
    assert binding.calls[1:] == ["abort"]


@pytest.mark.parametrize("orderly", [True, False])
def test_close_doesnt_wait_for_graphs_that_recorded_calls(
    peer: subprocess.Popen[bytes], orderly: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = threading.Event()
    monkeypatch.setattr(session, "_DESTROY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(Recording, "_end", lambda *_: gone.wait(60))
    own = connect(Recording(), peer)
    with caplog.at_level(logging.WARNING):
        nccl.close(own, orderly)
    assert ("CUDA graphs that recorded its calls" in caplog.text) is orderly
    gone.set()


def test_an_error_of_the_binding_has_nccls_text(peer: subprocess.Popen[bytes]) -> None:
    binding = Recording()
    own = connect(binding, peer)

    def refuse(*_: object) -> None:
        raise NCCLError("InvalidArgument (4): invalid argument")

    own.launch, launch = refuse, own.launch
    with pytest.raises(comm.CommError, match=r"^NCCL: InvalidArgument \(4\): invalid argument$"):
        nccl.all_reduce(own, torch.ones(3), None)
    own.launch = launch
    nccl.check(own)
    nccl.all_reduce(own, torch.ones(3), None)
    abort(own)


def test_a_peer_that_ends_is_noticed_before_the_next_call(peer: subprocess.Popen[bytes]) -> None:
    binding = Recording()
    own = connect(binding, peer)
    binding.async_error = 7  # in progress: no error
    nccl.check(own)
    peer.kill()
    wait_for(lambda: "abort" in binding.calls)
    for call in (lambda: nccl.check(own), lambda: nccl.all_reduce(own, torch.ones(3), None)):
        with pytest.raises(
            comm.CommTimeoutError, match=rf"rank 1 \(7 in the job\), process {peer.pid}, has ended"
        ) as e:
            call()
        assert e.value.ranks == (1,)
    nccl.close(own, orderly=True)
    assert binding.calls[1:] == ["abort"]


def test_a_peer_that_ends_while_nccl_waits_for_it(peer: subprocess.Popen[bytes]) -> None:
    arrived, late = threading.Event(), threading.Event()

    class Waiting(Recording):
        def comm_init_rank(self, nranks: int, comm_id: bytearray, rank: int) -> int:
            arrived.set()
            late.wait(60)
            return super().comm_init_rank(nranks, comm_id, rank)

    binding = Waiting()
    threading.Thread(target=lambda: arrived.wait(60) and peer.kill(), daemon=True).start()
    with pytest.raises(comm.CommTimeoutError, match=f"process {peer.pid}, has ended"):
        connect(binding, peer)
    late.set()
    # A communicator that is created too late is aborted.
    wait_for(lambda: binding.calls == [("init", 2, 0), "abort"])


def test_an_error_while_connecting_has_nccls_text(peer: subprocess.Popen[bytes]) -> None:
    class Failing(Recording):
        def comm_init_rank(self, nranks: int, comm_id: bytearray, rank: int) -> int:
            raise NCCLError(f"SystemError (2) with {nranks} of {len(comm_id)} bytes on {rank}")

    binding = Failing()
    binding.last_error = "no socket interface found"
    with pytest.raises(comm.CommError, match=r"NCCL: SystemError \(2\) .* \(no socket interface found\)"):
        connect(binding, peer)


def test_a_peer_that_ended_before_leaves_no_unused_id(peer: subprocess.Popen[bytes]) -> None:
    binding = Recording()
    peer.kill()
    peer.wait()
    with pytest.raises(comm.CommTimeoutError, match=f"process {peer.pid}, has ended"):
        connect(binding, peer)
    assert binding.calls == [("init", 1, 0), "abort"]


@pytest.mark.parametrize(("host", "namespace"), [(ELSEWHERE, ""), (HERE, "pid:[1]")])
def test_processes_of_other_hosts_and_namespaces_arent_watched(
    peer: subprocess.Popen[bytes], host: comm.Host, namespace: str
) -> None:
    binding = Recording()
    own = connect(binding, peer, host=host, process={"namespace": namespace} if namespace else None)
    peer.kill()
    peer.wait()
    nccl.check(own)
    # NCCL itself notices over the network.
    binding.async_error = 6
    with pytest.raises(comm.CommError, match="NCCL: remote process exited or there was a network error"):
        nccl.check(own)
    abort(own)


def test_without_pidfd_no_process_is_watched(peer: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(f"no descriptor for {pid} in here")

    monkeypatch.setattr(peers.os, "pidfd_open", refuse)
    own = connect(Recording(), peer)
    peer.kill()
    peer.wait()
    nccl.all_reduce(own, torch.ones(3), None)
    abort(own)


@pytest.mark.parametrize("stops", [False, True])
def test_a_peer_that_stops_is_noticed_and_one_that_closes_isnt(peer: subprocess.Popen[bytes], stops: bool) -> None:
    binding, other = Recording(), peers.OwnProcess()
    own = connect(binding, peer, process=other.describe())
    if stops:
        other.stop()
        wait_for(lambda: "abort" in binding.calls)
    other.close()
    time.sleep(2 * peers._POLL_S)
    raises = contextlib.nullcontext()
    for call in (lambda: nccl.check(own), lambda: nccl.all_reduce(own, torch.ones(3), None)):
        if stops:
            raises = pytest.raises(comm.CommTimeoutError, match=r"^rank 1 \(7 in the job\), process \d+, has stopped")
        with raises:
            call()
    assert ("abort" in binding.calls) is stops
    nccl.close(own, orderly=not stops)


def test_a_peer_whose_connect_fails_ends_the_wait(peer: subprocess.Popen[bytes]) -> None:
    other = peers.OwnProcess()
    late = threading.Event()

    class Waiting(Recording):
        def comm_init_rank(self, nranks: int, comm_id: bytearray, rank: int) -> int:
            other.stop()
            late.wait(60)
            return super().comm_init_rank(nranks, comm_id, rank)

    with pytest.raises(comm.CommTimeoutError, match="has stopped"):
        connect(Waiting(), peer, process=other.describe())
    late.set()
    other.close()


def test_no_thread_and_no_descriptor_is_left(peer: subprocess.Popen[bytes]) -> None:
    def left() -> tuple[int, int]:
        # Threads of earlier tests may be about to end.
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("comm-core nccl")]
        # Those of watched peers, and of the pipes that wake the threads. Others come and go, such as earlier tests'
        # connections.
        links = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile, such as the listing's own
                links.append(str(path.readlink()))
        return len(threads), sum("pidfd" in link or link.startswith("pipe:") for link in links)

    wait_for(lambda: left()[0] == 0)
    before = left()
    for orderly in (True, False):
        connect(Recording(), peer).close(orderly)
    wait_for(lambda: left() == before)
