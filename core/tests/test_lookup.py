"""What a handle looks up: outside a capture the eager plan, inside `comm.capture()` the one of what the stream does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comm_core._handle import lookup
from comm_core._handle.lookup import CaptureRoutes, FusedRoutes, RouteKey, Routes, bind, composed
from comm_core._plan.decide import Slate
from comm_core._plan.routes import Offer
from comm_core.types import TERMINAL, Range, Rule
from fake_handle import ALL_REDUCE, FUSED, aligned, one_backend

if TYPE_CHECKING:
    from comm_core._handle.lookup import BoundHook, RuleHook

GPU = torch.device("cuda", 1)
# As tensors tell it by `get_device()`.
ON_GPU, ON_CPU = 1, -1


def session(name: str) -> Any:
    hooks = {ALL_REDUCE: f"{name}'s sum", FUSED: f"{name}'s norm"}
    plugin = SimpleNamespace(hooks=hooks)
    return SimpleNamespace(plugin=plugin, value=f"session of {name}", checks_operands=name == "push")


def without_counter(bound: BoundHook | None) -> RuleHook | None:
    return None if bound is None else bound[:4]


def count(bound: BoundHook | None) -> None:
    """Count a call, as the handle does."""
    assert bound is not None
    next(bound[4])


def test_each_mode_has_entries_of_its_own() -> None:
    offers = (
        Offer("pull", 400, (Range(ALL_REDUCE, modes=("graph",), max_nbytes=1024),)),
        Offer("push", 300, (Range(ALL_REDUCE, dtypes=("float16",), max_nbytes=64), Range(FUSED, max_tokens=8))),
    )
    decision = Slate(offers).decision(("cuda", "cpu"))
    devices = {"cuda": GPU, "cpu": torch.device("cpu")}
    sessions = {name: session(name) for name in ("pull", "push")}
    eager, graph = (bind(decision, mode, devices, (print, "group"), sessions) for mode in ("eager", "graph"))

    def names(routes: Any, device: int, dtype: torch.dtype) -> list[str]:
        return [name for _, (_, _, name, _) in routes.entries.get((device, dtype), ())]

    assert names(eager.all_reduce, ON_GPU, torch.float16) == ["push", "torch_distributed"]
    assert names(graph.all_reduce, ON_GPU, torch.float16) == ["pull", "torch_distributed"]
    assert names(graph.all_reduce, ON_GPU, torch.int8) == ["pull", "torch_distributed"]
    for mode in (eager, graph):
        assert names(mode.fused, ON_GPU, torch.bfloat16) == ["push", "torch_distributed"]
    assert names(eager.all_reduce, ON_CPU, torch.int8) == ["torch_distributed"]
    assert not any(device == ON_CPU for device, _ in graph.all_reduce.entries)
    pulled = ("pull's sum", "session of pull", "pull", False)
    otherwise = (print, "group", "torch_distributed", False)
    found = [without_counter(graph.all_reduce.find((ON_GPU, torch.int8, nbytes))) for nbytes in (1, 1024, 1025)]
    assert found == [pulled, pulled, otherwise]
    assert graph.all_reduce.find((ON_GPU, torch.complex64, 8)) is None
    assert graph.all_reduce.find((ON_GPU, torch.int8, 0)) is None


def test_the_fused_hook_alone_gets_operands_that_core_hasnt_validated() -> None:
    decision = Slate((Offer("push", 300, (Range(ALL_REDUCE), Range(FUSED))),)).decision(("cpu",))
    routes = bind(decision, "eager", {"cpu": torch.device("cpu")}, (print, "group"), {"push": session("push")})
    fused = routes.fused.find((ON_CPU, torch.float32, torch.Size((2, 4))))
    assert without_counter(fused) == ("push's norm", "session of push", "push", True)
    plain = routes.all_reduce.find((ON_CPU, torch.float32, 32))
    assert without_counter(plain) == ("push's sum", "session of push", "push", False)


def test_a_fused_call_that_no_rule_takes_is_composed() -> None:
    rules = (Rule("push", max_nbytes=64, max_tokens=2, hidden_multiple=4), Rule(TERMINAL))
    pushed = (print, "session", "push", False)
    last = (composed, None, TERMINAL, False)
    routes = FusedRoutes({(ON_GPU, torch.float16): tuple(zip(rules, (pushed, last), strict=True))})

    def of(num_tokens: int, hidden_size: int, dtype: torch.dtype = torch.float16) -> Any:
        key = (ON_GPU, dtype, torch.Size((num_tokens, hidden_size)))
        assert routes.get(key) is None
        bound = routes.find(key)
        assert routes.find(key) == bound
        return without_counter(bound)

    assert of(1, 4) == of(2, 16) == pushed
    # Too many bytes, too many tokens, no multiple, nothing, another dtype.
    for found in (of(2, 20), of(3, 4), of(2, 6), of(0, 4), of(1, 4, torch.float64)):
        assert found == last


def test_a_route_is_kept_after_some_calls_with_its_key() -> None:
    bound = (print, "group", TERMINAL, False)
    routes, key = Routes({(ON_CPU, torch.int8): ((Rule(TERMINAL), bound),)}), (ON_CPU, torch.int8, 8)
    for _ in range(lookup._CHECKED_CALLS):
        assert routes.get(key) is routes[key] is None
        found = routes.find(key)
        assert without_counter(found) == bound
    assert routes.get(key) is routes[key] is found


def test_what_is_kept_is_bounded_and_every_call_stays_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_CHECKED_CALLS", 1)
    bound = (print, "group", TERMINAL, False)
    routes = Routes({(ON_CPU, torch.int8): ((Rule(TERMINAL), bound),)})
    assert routes.totals() == {}
    for nbytes in range(1, 10_000):
        found = routes.find((ON_CPU, torch.int8, nbytes))
        assert without_counter(found) == bound
        count(found)
    assert 0 < len(routes) < 5000
    route: RouteKey = (ON_CPU, torch.int8, TERMINAL, "")
    assert routes.totals() == routes.totals() == {route: (9_999, sum(range(1, 10_000)))}
    count(routes.find((ON_CPU, torch.int8, 1)))
    assert routes.totals() == {route: (10_000, sum(range(1, 10_000)) + 1)}


def nonzero(routes: Routes) -> dict[RouteKey, tuple[int, int]]:
    return {route: counts for route, counts in routes.totals().items() if counts[0]}


def test_inside_a_capture_the_stream_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def routes(**names: int) -> Routes:
        rule = Rule(TERMINAL)
        return Routes({(device, torch.int8): ((rule, (print, None, name, False)),) for name, device in names.items()})

    monkeypatch.setattr(lookup, "_CHECKED_CALLS", 1)
    inside = CaptureRoutes(routes(eager=ON_GPU, cpu=ON_CPU), routes(graph=ON_GPU))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def of(device: int, dtype: torch.dtype = torch.int8) -> str | None:
        key = (device, dtype, 8)
        bound = inside.get(key) or inside.find(key)
        assert inside.get(key) is inside[key] is bound
        return bound[2] if bound else None

    assert of(ON_GPU) == "eager"
    capturing = True
    assert of(ON_GPU) == "graph"
    # A stream of the GPU's says nothing of tensors on the CPU.
    assert of(ON_CPU) == "cpu"
    assert of(ON_GPU, torch.int16) is None
    key = (ON_GPU, torch.int8, 8)
    count(inside[key])
    next(inside.counter(("cuda", torch.bool, 8), TERMINAL))
    next(inside.counter(("cpu", torch.bool, 4), TERMINAL))
    capturing = False
    assert of(ON_GPU) == "eager"
    count(inside[key])
    count(inside[key])
    by_torch = torch.bool, TERMINAL, ""
    assert nonzero(inside._graph) == {(ON_GPU, torch.int8, "graph", ""): (1, 8), ("cuda", *by_torch): (1, 8)}
    assert nonzero(inside._eager) == {(ON_GPU, torch.int8, "eager", ""): (2, 16), ("cpu", *by_torch): (1, 4)}


def test_a_handle_serves_the_same_inside_a_capture_where_there_are_no_graphs() -> None:
    backend, fast, _ = one_backend()
    for on in (True, False):
        backend._serving.use_graph_routes(on)
        x = aligned(16).view(2, 8)
        assert torch.equal(backend.all_reduce(x), 2 * x)
        backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8))
    assert len(fast.calls) == 4
    backend._serving.retire("over")
    backend._serving.use_graph_routes(True)
    with pytest.raises(RuntimeError, match="over"):
        backend.all_reduce(x)
