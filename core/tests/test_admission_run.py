from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from comm_core._group import admission
from comm_core._group.admission import run_cases
from comm_core._handle import fallback, quant
from comm_core._plan.cases import AdmissionCase
from comm_core.errors import CaptureError
from comm_core.types import DTYPES, OPS

ALL_REDUCE, FUSED, QUANT = OPS
CPU = torch.device("cpu")
Hook = Callable[..., Any]


def no_talk(_: list[int]) -> list[list[int]]:
    raise AssertionError("nothing is exchanged without graphs")


class Group:
    """All-reduces between threads, one a rank; a fault may spoil what a rank sums."""

    def __init__(self, world_size: int, fault: Callable[[int, list[torch.Tensor]], object] = lambda *_: None) -> None:
        self.world_size = world_size
        self.fault = fault
        self.slots: list[torch.Tensor] = [torch.empty(0)] * world_size
        self.barrier = threading.Barrier(world_size, timeout=120)

    def total(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        terms = [slot.clone() for slot in self.slots]
        self.barrier.wait()
        self.fault(rank, terms)
        return torch.stack(terms).sum(0).to(tensor.dtype)

    def hooks(self, rank: int) -> dict[str, Hook]:
        def all_reduce(session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            total = self.total(rank, tensor)
            return total if out is None else out.copy_(total)

        def fused(session: object, tensor: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return fallback.add_rms_norm(self.total(rank, tensor), *rest)

        def quantized(session: object, *arguments: Any) -> None:
            *inputs, form, scale, out, residual_out, norm_out = arguments
            normed, _ = fused(session, *inputs, norm_out, residual_out)
            quant.quantize(normed, form, scale, out)

        return {ALL_REDUCE: all_reduce, FUSED: fused, QUANT: quantized}

    def run(
        self, todo: Sequence[AdmissionCase], change: Callable[[dict[str, Hook]], object] = lambda _: None
    ) -> list[Any]:
        """What `run_cases` returns on each rank."""
        results: list[Any] = [None] * self.world_size

        def member(rank: int) -> None:
            hooks = self.hooks(rank)
            change(hooks)
            results[rank] = run_cases(
                hooks,
                None,
                todo,
                rank=rank,
                world_size=self.world_size,
                device=CPU,
                all_gather=no_talk,
                end_step=lambda _: None,
            )

        threads = [threading.Thread(target=member, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        return results


def a_case(op: str = ALL_REDUCE, dtype: str = "bfloat16", *shape: int) -> AdmissionCase:
    return AdmissionCase((op, "eager", "cpu", dtype), shape or ((3000,) if op == ALL_REDUCE else (5, 1024)))


EVERY_KIND = [a_case(op, dtype) for op in OPS for dtype in DTYPES if op == ALL_REDUCE or "float" in dtype]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_backend_that_sums_is_admitted(world_size: int) -> None:
    todo = [
        *EVERY_KIND,
        a_case(ALL_REDUCE, "int8", 1),
        a_case(ALL_REDUCE, "float64", 7),
        a_case(FUSED, "float16", 1, 8),
    ]
    assert Group(world_size).run(todo) == [{}] * world_size


def leave_out(rank: int, terms: list[torch.Tensor]) -> None:
    del terms[0]


def take_twice(rank: int, terms: list[torch.Tensor]) -> None:
    terms[0] = terms[1]


def shift(rank: int, terms: list[torch.Tensor]) -> None:
    terms[1] = terms[1].flatten().roll(8).view_as(terms[1])


def one_element(rank: int, terms: list[torch.Tensor]) -> None:
    terms[0].view(-1)[-1] += 1


@pytest.mark.parametrize("fault", [leave_out, take_twice, shift, one_element])
def test_wrong_sums_are_noticed_in_every_kind_of_message(fault: Callable[[int, list[torch.Tensor]], None]) -> None:
    for wrong in Group(2, fault).run(EVERY_KIND):
        assert set(wrong) == {case.cell for case in EVERY_KIND}
        assert all("wrong sums" in reason for reason in wrong.values())


def test_a_reason_says_what_came_and_what_was_due() -> None:
    (wrong, _) = Group(2, one_element).run([a_case(ALL_REDUCE, "int32", 40)])
    (reason,) = wrong.values()
    assert reason.startswith("ArithmeticError: int32 [40]: 1 wrong sums, the first at element 39: ")
    came, due = reason.rsplit(": ", 1)[1].split(" instead of ")
    assert int(came) == int(due) + 1


def test_one_rank_can_fail_without_blocking_the_others() -> None:
    def on_rank_1(rank: int, terms: list[torch.Tensor]) -> None:
        if rank == 1:
            leave_out(rank, terms)

    right, wrong, *others = Group(4, on_rank_1).run(EVERY_KIND)
    assert [right, *others] == [{}] * 3
    assert set(wrong) == {case.cell for case in EVERY_KIND}


def test_a_dtype_that_is_wrong_is_the_only_one() -> None:
    def for_int8(rank: int, terms: list[torch.Tensor]) -> None:
        if terms[0].dtype is torch.int8:
            leave_out(rank, terms)

    cell = a_case(dtype="int8").cell
    assert [set(wrong) for wrong in Group(2, for_int8).run(EVERY_KIND)] == [{cell}, {cell}]


def test_the_first_reason_is_kept() -> None:
    def raises(rank: int, terms: list[torch.Tensor]) -> None:
        raise RuntimeError(f"{terms[0].numel()} elements")

    todo = [a_case(ALL_REDUCE, "int8", 3), a_case(ALL_REDUCE, "int8", 5)]
    assert Group(2, raises).run(todo) == [{todo[0].cell: "RuntimeError: 3 elements"}] * 2


def replaced(op: str, change: Callable[[Hook], Hook]) -> Callable[[dict[str, Hook]], None]:
    def change_hooks(hooks: dict[str, Hook]) -> None:
        hooks[op] = change(hooks[op])

    return change_hooks


def overwrites(hook: Hook) -> Hook:
    def all_reduce(session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = hook(session, tensor, tensor)
        return result.clone() if out is None else result

    return all_reduce


def ignores_out(hook: Hook) -> Hook:
    return lambda session, tensor, _: hook(session, tensor, None)


def widens(hook: Hook) -> Hook:
    return lambda session, tensor, out: hook(session, tensor, out).to(torch.float32)


def flattens(hook: Hook) -> Hook:
    return lambda session, tensor, out: hook(session, tensor, out)[:-1]


def is_stale(hook: Hook) -> Hook:
    first: list[torch.Tensor] = []

    def all_reduce(session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        first.append(hook(session, tensor, None))
        return first[0] if out is None else out.copy_(first[0])

    return all_reduce


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overwrites, "`tensor` was overwritten"),
        (ignores_out, "`out` wasn't returned"),
        (widens, "the result is float32 [3000], not a tensor of that dtype and shape"),
        (flattens, "the result is bfloat16 [2999], not a tensor of that dtype and shape"),
        (lambda _hook: lambda *_: None, "the result is a NoneType, not a tensor of that dtype and shape"),
        (is_stale, "wrong sums"),
    ],
)
def test_a_hook_that_breaks_its_contract_is_not_admitted(change: Callable[[Hook], Hook], words: str) -> None:
    for wrong in Group(2).run([a_case()], replaced(ALL_REDUCE, change)):
        assert words in wrong[a_case().cell]


def fused(change: Callable[..., Any]) -> Callable[[Hook], Hook]:
    return lambda hook: lambda *arguments: change(hook, *arguments)


def keeps_the_weight_out(hook: Hook, session: Any, x: Any, residual: Any, weight: Any, *rest: Any) -> Any:
    return hook(session, x, residual, torch.ones_like(weight), *rest)


def keeps_the_residual_out(hook: Hook, session: Any, x: Any, residual: Any, *rest: Any) -> Any:
    return hook(session, x, torch.zeros_like(residual), *rest)


def ignores_residual_out(hook: Hook, *arguments: Any) -> Any:
    return hook(*arguments[:-1], None)


def overwrites_the_residual(hook: Hook, session: Any, x: Any, residual: Any, *rest: Any) -> Any:
    normed, summed = hook(session, x, residual, *rest)
    residual.copy_(summed)
    return normed, summed


def widens_the_norm(hook: Hook, *arguments: Any) -> Any:
    normed, summed = hook(*arguments)
    return normed.double(), summed


def swaps(hook: Hook, *arguments: Any) -> Any:
    return hook(*arguments)[::-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (keeps_the_weight_out, "wrong norms, the first at element 1: "),
        (keeps_the_residual_out, "wrong sums"),
        (ignores_residual_out, "`residual_out` wasn't returned"),
        (overwrites_the_residual, "`residual` was overwritten"),
        (widens_the_norm, "the result is float64 [5, 1024], not a tensor of that dtype and shape"),
        (swaps, "wrong sums"),
    ],
)
def test_a_fused_hook_that_breaks_its_contract_is_not_admitted(change: Callable[..., Any], words: str) -> None:
    for dtype in ("float32", "bfloat16"):
        case = a_case(FUSED, dtype)
        for wrong in Group(2).run([case], replaced(FUSED, fused(change))):
            assert words in wrong[case.cell]


def test_a_fused_hook_that_implements_nothing_of_a_kind_is_not_admitted_for_it() -> None:
    asked = []

    def declines(*arguments: Any) -> Any:
        asked.append(arguments)
        return NotImplemented

    case = a_case(FUSED)
    for wrong in Group(2).run([case], replaced(FUSED, fused(declines))):
        assert "returned NotImplemented" in wrong[case.cell]
    # On two ranks, out of place and in place.
    assert [[out is None for out in arguments[-2:]] for arguments in asked].count([True, True]) == 2
    assert [(arguments[-2] is arguments[2], arguments[-1] is arguments[3]) for arguments in asked].count(
        (True, True)
    ) == 2


def test_the_sessions_own_object_reaches_the_hook() -> None:
    seen = []

    def all_reduce(session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        seen.append(session)
        return tensor.clone() if out is None else out

    ends: list[str] = []
    hooks = {ALL_REDUCE: all_reduce}
    wrong = run_cases(
        hooks,
        "the session",
        [a_case()],
        rank=0,
        world_size=1,
        device=CPU,
        all_gather=no_talk,
        end_step=ends.append,
    )
    assert wrong == {}
    assert seen == ["the session"] * 2
    assert ends == ["", ""]


def test_a_failed_step_ends_with_its_reason_and_may_end_the_test() -> None:
    def all_reduce(session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        raise MemoryError("no room")

    def end_step(reason: str) -> None:
        raise EOFError(reason)

    hooks = {ALL_REDUCE: all_reduce}
    with pytest.raises(EOFError, match="MemoryError: no room"):
        run_cases(hooks, None, [a_case()], rank=0, world_size=2, device=CPU, all_gather=no_talk, end_step=end_step)


# Graphs: what is recorded here is a list of words


class Recorder:
    """Stands in for CUDA graphs; a case of 13 elements can't be recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(admission._Tester, "record", lambda _, case: self.record(case))

    def record(self, case: AdmissionCase) -> Callable[[int], None]:
        self.log.append(f"record {case.shape[0]}")
        if case.shape[0] == 13:
            raise RuntimeError("not here")
        return lambda salt: self.log.append(f"replay {case.shape[0]} with {salt}")

    @contextlib.contextmanager
    def capture_ctx(self, session: object) -> Iterator[None]:
        self.log.append(f"enter {session}")
        yield
        self.log.append("leave")


def test_graphs_that_every_rank_has_are_replayed_after_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    todo = [
        AdmissionCase((ALL_REDUCE, "graph", "cuda", dtype), (n,))
        for dtype, n in (("int8", 7), ("int16", 13), ("int32", 19))
    ]
    gathered: list[list[int]] = []

    def all_gather(mine: list[int]) -> list[list[int]]:
        gathered.append(mine)
        return [mine, [1, 2]]

    hooks = {"capture_ctx": recorder.capture_ctx}
    ends: list[str] = []
    wrong = run_cases(hooks, "it", todo, rank=0, world_size=2, device=CPU, all_gather=all_gather, end_step=ends.append)
    assert recorder.log == [
        "enter it", "record 7", "record 13", "record 19", "leave", "replay 19 with 1", "replay 19 with 2"
    ]  # fmt: skip
    assert gathered == [[0, 2]]
    assert wrong == {todo[1].cell: "RuntimeError: not here"}
    assert ends == ["", "RuntimeError: not here", "", "", ""]


@pytest.mark.parametrize("where", ["here", "there", "twice"])
def test_a_capture_that_cant_be_left_is_recorded_once_more(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    recorder, left = Recorder(monkeypatch), 0

    @contextlib.contextmanager
    def capture_ctx(session: object) -> Iterator[None]:
        nonlocal left
        with recorder.capture_ctx(session):
            yield
        left += 1
        if where == "twice" or (where == "here" and left == 1):
            raise CaptureError("its input can't be shared")

    def all_gather(mine: list[int]) -> list[list[int]]:
        return [mine, [-1] if where == "there" and left == 1 else mine]

    todo = [AdmissionCase((ALL_REDUCE, "graph", "cuda", "int8"), (7,))]
    hooks = {"capture_ctx": capture_ctx}
    test = functools.partial(
        run_cases,
        hooks,
        "it",
        todo,
        rank=0,
        world_size=2,
        device=CPU,
        all_gather=all_gather,
        end_step=lambda _: None,
    )
    if where == "twice":
        with pytest.raises(CaptureError, match="can't be shared"):
            test()
    else:
        assert test() == {}
        assert recorder.log == [*["enter it", "record 7", "leave"] * 2, "replay 7 with 1", "replay 7 with 2"]
    assert left == 2
