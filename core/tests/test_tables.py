"""What a handle looks up: outside a capture the eager plan, inside `comm.capture()` the one of what the stream does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comm_core.negotiate import Slate
from comm_core.routes import Offer
from comm_core.tables import Recording, bind
from comm_core.types import Range
from fake_handle import ALL_REDUCE, FUSED, aligned, one_backend

GPU = torch.device("cuda", 1)
# As tensors tell it by `get_device()`.
ON_GPU, ON_CPU = 1, -1


def session(name: str) -> Any:
    hooks = {ALL_REDUCE: f"{name}'s sum", FUSED: f"{name}'s norm"}
    return SimpleNamespace(plugin=SimpleNamespace(hooks=hooks), value=f"session of {name}")


def test_each_mode_has_entries_of_its_own() -> None:
    offers = (
        Offer("pull", 400, (Range(ALL_REDUCE, modes=("graph",), max_nbytes=1024),)),
        Offer("push", 300, (Range(ALL_REDUCE, dtypes=("float16",), max_nbytes=64), Range(FUSED, max_tokens=8))),
    )
    decision = Slate(offers).decision(("cuda", "cpu"))
    devices = {"cuda": GPU, "cpu": torch.device("cpu")}
    sessions = {name: session(name) for name in ("pull", "push")}
    eager, graph = (bind(decision, mode, devices, (print, "group"), sessions) for mode in ("eager", "graph"))

    def names(table: Any, device: int, dtype: torch.dtype) -> list[str]:
        return [entry[5] for entry in table.get((device, dtype), ())]

    assert names(eager.plain, ON_GPU, torch.float16) == ["push", "torch_distributed"]
    assert names(graph.plain, ON_GPU, torch.float16) == ["pull", "torch_distributed"]
    assert names(graph.plain, ON_GPU, torch.int8) == ["pull", "torch_distributed"]
    assert names(eager.fused, ON_GPU, torch.bfloat16) == names(graph.fused, ON_GPU, torch.bfloat16) == ["push"]
    assert names(eager.plain, ON_CPU, torch.int8) == ["torch_distributed"]
    assert not any(device == ON_CPU for device, _ in graph.plain)
    low, high, multiple, hook, value, _ = graph.plain[ON_GPU, torch.int8][0]
    assert (low, high, multiple, hook, value) == (1, 1024, 1, "pull's sum", "session of pull")


def test_inside_a_capture_the_stream_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {(ON_GPU, torch.int8): "eager", (ON_CPU, torch.int8): "of the CPU"}
    noted: list[None] = []
    table = Recording(eager, {(ON_GPU, torch.int8): "graph"}, lambda: noted.append(None))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert table.get((ON_GPU, torch.int8)) == "eager"
    assert not noted
    capturing = True
    assert table.get((ON_GPU, torch.int8)) == "graph"
    assert len(noted) == 1
    # A stream of the GPU's says nothing of tensors on the CPU.
    assert table.get((ON_CPU, torch.int8)) == "of the CPU"
    assert table.get((ON_GPU, torch.int16)) is None
    assert (ON_GPU, torch.int8) in table


def test_a_handle_serves_the_same_inside_a_capture_where_there_are_no_graphs() -> None:
    backend, fast, _ = one_backend()
    for on in (True, False):
        backend.record(on)
        x = aligned(16).view(2, 8)
        assert torch.equal(backend.all_reduce(x), 2 * x)
        backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8))
    assert len(fast.calls) == 4
    backend.retire("over")
    backend.record(True)
    with pytest.raises(RuntimeError, match="over"):
        backend.all_reduce(x)
