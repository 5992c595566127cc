"""Functions that run in each rank: the real plugin, over a fake of nccl4py's binding that sums by Gloo."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import comm_core as comm
import comm_plugin_nccl
import pytest
import torch
import torch.distributed as dist
from comm_plugin_nccl import policy, session
from harness import side_store

DTYPES = {code: dtype for dtype, code in policy.DTYPE_CODES.items()}


class NCCLError(Exception):
    """The binding's exception."""


class Binding:
    """The functions of nccl4py's low-level module that the plugin uses; `calls` lists the calls.

    Attributes:
        stuck: if set, `all_reduce` calls it and then waits until the communicator is aborted, as a kernel would.
    """

    NCCLError = NCCLError

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.calls: list[Any] = []
        self.stuck: Callable[[], object] | None = None
        self.aborted = threading.Event()
        self.async_error = 0
        self.last_error = ""
        self.identity = bytes(range(128))

    def get_unique_id(self) -> bytes:
        return self.identity

    def Comm(self) -> int:  # noqa: N802 - the binding's name
        return 0

    def comm_init_rank(self, nranks: int, comm_id: bytearray, rank: int) -> int:
        assert bytes(comm_id) == self.identity, "the first rank's"
        self.calls.append(("init", nranks, rank))
        return 7

    def all_reduce(
        self, send: int, receive: int, count: int, code: int, op: int, communicator: int, stream: int
    ) -> None:
        assert (communicator, op, stream) == (7, 0, 3)
        if self.stuck:
            self.stuck()
            self.aborted.wait(60)
            return
        source, target = (view(address, count, DTYPES[code]) for address in (send, receive))
        total = source.clone()
        dist.all_reduce(total, group=self.group)
        target.copy_(total)

    def comm_get_async_error(self, communicator: int) -> int:
        assert communicator == 7
        return self.async_error

    def get_error_string(self, code: int) -> str:
        return {6: "remote process exited or there was a network error"}[code]

    def get_last_error(self, communicator: int) -> str:
        assert communicator in {0, 7}
        return self.last_error

    def comm_abort(self, communicator: int) -> None:
        self._end("abort", communicator)

    def comm_destroy(self, communicator: int) -> None:
        self._end("destroy", communicator)

    def _end(self, how: str, communicator: int) -> None:
        assert communicator == 7
        self.calls.append(how)
        self.aborted.set()


def view(address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    memory = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=numel)


class CpuPlugin:
    """The plugin, for CPU tensors instead of CUDA tensors."""

    COMM_HOOK_API = (1, 0)
    abort = staticmethod(comm_plugin_nccl.abort)
    all_reduce = staticmethod(comm_plugin_nccl.all_reduce)
    check = staticmethod(comm_plugin_nccl.check)
    close = staticmethod(comm_plugin_nccl.close)

    def __init__(self) -> None:
        self.bindings: list[Binding] = []

    @comm.hookimpl
    def is_available(self, topology: comm.Topology) -> comm.Available:
        assert topology.device_types == ("cpu",)
        dtypes = tuple(map(str, policy.DTYPE_CODES))
        return comm.Available(900, (comm.Range("all_reduce", ("eager",), dtypes, ("cpu",)),))

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> session.Session:
        self.bindings.append(Binding(context.group))
        return session.connect(self.bindings[-1], lambda _: 3, topology, context)


plugin = CpuPlugin()


def handle(group: Any = None) -> tuple[comm.Backend, Binding]:
    found = comm.get_backend(group, backends=("nccl",))
    assert found.name == "nccl", found.explain()
    return found, plugin.bindings[-1]


def groups_and_places() -> list[Any]:
    """Sums in the world and in a group of two of its ranks, in and out of place; returns the bindings' calls."""
    world, _ = handle()
    pair = dist.new_group([0, 2])
    handles = [(world, 3)]
    if dist.get_rank() != 1:
        handles.append((handle(pair)[0], 2))
    for each, count in handles:
        for dtype in policy.DTYPE_CODES:
            x = torch.arange(50).to(dtype)
            y = each.all_reduce(x)
            assert torch.equal(y, x * count)
            assert torch.equal(x, torch.arange(50).to(dtype))
            assert each.all_reduce(x, out=x) is x
            assert torch.equal(x, y)
        assert torch.equal(each.all_reduce(torch.ones(5, dtype=torch.int16)), torch.full((5,), count).to(torch.int16))
        each.check()
    comm.close()
    bindings = plugin.bindings[-len(handles) :]
    return [binding.calls for binding in bindings]


def errors_by_name() -> list[str]:
    """Returns the texts of an error that the binding raises, and of one that NCCL notices by itself."""
    found, binding = handle()
    texts = []
    with mock.patch.object(found._serving.sessions["nccl"].value, "launch", side_effect=NCCLError("InvalidUsage (5)")):
        binding.last_error = "too many of them"
        texts.append(raised(found))
    assert "refuses further calls" in raised(found)
    comm.close()
    found, binding = handle()
    assert found.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    binding.async_error, binding.last_error = 6, "socket closed"
    if dist.get_rank() == 0:
        # The watcher queries by itself.
        wait_for(lambda: "abort" in binding.calls)
        texts.append(raised(found))
    texts += [raised(found, "check"), raised(found)]
    wait_for(lambda: "abort" in binding.calls)
    comm.close()
    assert binding.calls.count("abort") == 1
    assert "destroy" not in binding.calls
    return texts


def killed_peer() -> dict[str, Any]:
    """Ranks 0 and 2 wait in a call for rank 1, which is killed."""
    found, binding = handle()
    rank = dist.get_rank()
    if rank == 1:
        side_store().wait(["waits 0", "waits 2"])
        os.kill(os.getpid(), signal.SIGKILL)
    binding.stuck = lambda: side_store().set(f"waits {rank}", "")
    found.all_reduce(torch.ones(3))
    with pytest.raises(comm.CommTimeoutError) as caught:
        found.all_reduce(torch.ones(3))
    # Neither rank ends before the other has noticed rank 1's end.
    side_store().set(f"done {rank}", "")
    side_store().wait([f"done {2 - rank}"])
    return {"text": str(caught.value), "ranks": caught.value.ranks, "calls": binding.calls}


def stopped_peer() -> dict[str, Any]:
    """Ranks 0 and 2 wait in a call for rank 1, whose call raises."""
    found, binding = handle()
    rank = dist.get_rank()
    if rank == 1:
        side_store().wait(["waits 0", "waits 2"])
        with mock.patch.object(found._serving.sessions["nccl"].value, "launch", side_effect=NCCLError("its fault")):
            raised(found)
    else:
        binding.stuck = lambda: side_store().set(f"waits {rank}", "")
        found.all_reduce(torch.ones(3))
    text = raised(found)
    comm.close()
    wait_for(lambda: "abort" in binding.calls)
    return {"text": text, "calls": binding.calls}


def raised(found: comm.Backend, call: str = "all_reduce") -> str:
    with pytest.raises(comm.CommError) as caught:
        found.check() if call == "check" else found.all_reduce(torch.ones(3))
    return str(caught.value)


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def fallback_serves() -> dict[str, str]:
    """The installed plugin, without a GPU."""
    found = comm.get_backend()
    assert found.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
    candidate = found.decision.candidate("nccl")
    assert candidate is not None
    comm.close()
    return {"name": found.name, "verdict": candidate.verdict, "reason": candidate.reason, "explains": found.explain()}
