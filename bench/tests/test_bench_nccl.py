"""The bare binding of NCCL as a peer, over a fake of nccl4py's module."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comm_bench import peer_nccl
from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent, behind_itself


def case(mode: str = "eager", dtype: str = "bfloat16", op: str = "all_reduce", numel: int = 300) -> BenchCase:
    return BenchCase(op, mode, "out", dtype, "cuda", (numel,))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the module is asked to do."""
    calls: list[Any] = []
    module = ModuleType("nccl.bindings.nccl")
    module.__dict__.update(
        get_version=lambda: 22809,
        get_unique_id=lambda: b"id",
        comm_init_rank=lambda *arguments: calls.append(arguments) or "communicator",  # type: ignore[func-returns-value]
        all_reduce=lambda *arguments: calls.append(arguments),
    )
    for name in ("nccl", "nccl.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    return calls


def job(others: tuple[str, str] = ("", ""), device: str = "cuda:1") -> Any:
    return SimpleNamespace(rank=0, world_size=2, device=torch.device(device), gather=lambda mine: [mine, others])


def made(one: Any) -> Any:
    ((name, make),) = peer_nccl.peers(one, ("all_reduce",), 1 << 20, 0)
    assert name == "nccl_raw"
    return make()


def test_calls_between_two_buffers_and_in_place(said: list[Any]) -> None:
    contender = made(job())
    assert said.pop() == (2, bytearray(b"id"), 0)
    one = BenchCase("all_reduce", "eager", "out", "bfloat16", "cpu", (300,))
    state = contender.inputs(one)
    second = contender.call(state, None, in_place=False)
    third = contender.call(second, None, in_place=False)
    assert third[0] is state[0]
    contender.call(third, None, in_place=True)
    first, other = state[0].data_ptr(), second[0].data_ptr()
    assert abs(first - other) >= 600
    tail = (300, 9, 0, "communicator", 101)
    assert said == [(first, other, *tail), (other, first, *tail), (first, first, *tail)]
    smaller = contender.inputs(BenchCase("all_reduce", "eager", "out", "int64", "cpu", (3,)))
    assert smaller[0].data_ptr() == first
    contender.call(smaller, None, in_place=True)
    assert said[-1] == (first, first, 3, 4, *tail[2:])


def test_it_takes_what_nccl_sums_and_has_a_kernel_between_in_graphs(said: list[Any]) -> None:
    contender = made(job())
    assert contender.takes(case())
    assert not contender.takes(case(dtype="int16"))
    assert not contender.takes(case(op="all_reduce_add_rms_norm"))
    assert contender.spaced(case("graph"))
    assert not contender.spaced(case())
    assert not behind_itself(case("graph", op="all_reduce_add_rms_norm"))


def test_whoever_lacks_it_keeps_all_from_waiting(said: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Absent, match="rank 1: nccl4py can't be used: no"):
        made(job(("nccl4py can't be used: no", "")))
    monkeypatch.setitem(sys.modules, "nccl", None)
    monkeypatch.delitem(sys.modules, "nccl.bindings.nccl")
    with pytest.raises(Absent, match="rank 0: nccl4py can't be used"):
        made(job())
    assert said == []
    assert peer_nccl.peers(job(device="cpu"), ("all_reduce",), 1, 0) == []
