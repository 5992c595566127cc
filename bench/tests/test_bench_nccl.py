"""NCCL's low-level binding as a peer, with a fake of nccl4py's module."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comm_bench import peer_nccl
from comm_bench.backends import nccl_needs_spacer
from comm_bench.cases import BenchCase
from comm_bench.contenders import Absent


def case(mode: str = "eager", dtype: str = "bfloat16", op: str = "all_reduce", numel: int = 300) -> BenchCase:
    return BenchCase(op, mode, "out", dtype, "cuda", (numel,))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the fake module."""
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
    return SimpleNamespace(rank=0, world_size=2, device=torch.device(device), all_gather=lambda mine: [mine, others])


def make_contender(one: Any) -> Any:
    ((name, make),) = peer_nccl.peers(one, ("all_reduce",), 1 << 20, 0)
    assert name == "nccl_raw"
    return make()


def test_calls_between_two_buffers_and_in_place(calls: list[Any]) -> None:
    contender = make_contender(job())
    assert calls.pop() == (2, bytearray(b"id"), 0)
    one = BenchCase("all_reduce", "eager", "out", "bfloat16", "cpu", (300,))
    state = contender.inputs(one)
    second = contender.call(state, None, in_place=False)
    third = contender.call(second, None, in_place=False)
    assert third[0] is state[0]
    contender.call(third, None, in_place=True)
    first, other = state[0].data_ptr(), second[0].data_ptr()
    assert abs(first - other) >= 600
    tail = (300, 9, 0, "communicator", 101)
    assert calls == [(first, other, *tail), (other, first, *tail), (first, first, *tail)]
    smaller = contender.inputs(BenchCase("all_reduce", "eager", "out", "int64", "cpu", (3,)))
    assert smaller[0].data_ptr() == first
    contender.call(smaller, None, in_place=True)
    assert calls[-1] == (first, first, 3, 4, *tail[2:])


def test_it_supports_nccls_dtypes_and_needs_spacers_in_graphs(calls: list[Any]) -> None:
    contender = make_contender(job())
    assert contender.supports(case())
    assert not contender.supports(case(dtype="int16"))
    assert not contender.supports(case(op="all_reduce_add_rms_norm"))
    assert contender.needs_spacer(case("graph"))
    assert not contender.needs_spacer(case())
    assert not nccl_needs_spacer(case("graph", op="all_reduce_add_rms_norm"))


def test_a_rank_without_the_binding_makes_all_ranks_raise(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Absent, match="rank 1: nccl4py can't be imported: no"):
        make_contender(job(("nccl4py can't be imported: no", "")))
    monkeypatch.setitem(sys.modules, "nccl", None)
    monkeypatch.delitem(sys.modules, "nccl.bindings.nccl")
    with pytest.raises(Absent, match="rank 0: nccl4py can't be imported"):
        make_contender(job())
    assert calls == []
    assert peer_nccl.peers(job(device="cpu"), ("all_reduce",), 1, 0) == []
