"""The admission test: known integers through a candidate, compared with arithmetic, before anybody relies on it.

Drivers that report working peer access and then deliver wrong data exist, so no backend serves a kind of message that
it hasn't summed correctly on these devices, at the edges of the sizes that it would own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from comm_core._control.deadline import describe
from comm_core._plan.cases import AdmissionCase
from comm_core._plan.routes import Cell
from comm_core.errors import CaptureError

__all__ = ["run"]

# The largest integer up to which a dtype holds every integer, so that sums are exact whatever their order.
_EXACT = {"bfloat16": 256, "float16": 2048, "int8": 127, "uint8": 255}
# Period of the test pattern in elements: a prime, so that no chunk, vector or block of a kernel lines up with it.
_PERIOD = 1021
# In place of the numbers of recorded cases: the capture couldn't be left.
_FAILED = -1


def run(
    plugin_hooks: Mapping[str, Callable[..., Any]],
    session: Any,
    todo: Sequence[AdmissionCase],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    all_gather: Callable[[list[int]], list[list[int]]],
) -> dict[Cell, str]:
    """Put every case through a backend. Collective: every rank makes every call, whatever came of those before.

    Args:
        plugin_hooks: the plugin's hooks by name.
        session: what its `connect` returned.
        todo: the cases, equal on every rank.
        rank: this rank's group rank.
        world_size: ranks in the group.
        device: of the group's accelerator, else the CPU.
        all_gather: every rank's value, by group rank; called where there are cases of the mode "graph".

    Returns:
        Why a kind of message failed on this rank; empty where all is well.
    """
    tester = _Tester(plugin_hooks, session, rank, world_size, device)
    wrong: dict[Cell, str] = {}
    eager = [case for case in todo if case.cell[1] == "eager"]
    steps = itertools.product(eager, (tester.out_of_place, tester.in_place))
    # Each call has data of its own, so that the output of the call before can't pass for the result.
    for salt, (case, step) in enumerate(steps):
        _note(wrong, case, functools.partial(step, case, salt))
    graphs = [case for case in todo if case.cell[1] == "graph"]
    if graphs:
        _run_graphs(tester, graphs, wrong, all_gather)
    return wrong


def _run_graphs(
    tester: _Tester,
    todo: Sequence[AdmissionCase],
    wrong: dict[Cell, str],
    all_gather: Callable[[list[int]], list[list[int]]],
) -> None:
    """Record every case inside one capture context, leave it, then replay each graph twice with other data.

    A session that can't leave a capture may do the next one without what it couldn't, so it has two.
    """
    for last in (False, True):
        graphs, failure = _record(tester, todo, wrong)
        gathered = all_gather([_FAILED] if failure else sorted(graphs))
        if not any(_FAILED in numbers for numbers in gathered):
            break
        if last:
            raise failure or CaptureError("the capture couldn't be left on another rank")
    # A graph that only some ranks have would wait for the others for ever.
    everywhere = set(graphs).intersection(*gathered)
    for number, salt in itertools.product(sorted(everywhere), (1, 2)):
        _note(wrong, todo[number], functools.partial(graphs[number], salt))


def _record(
    tester: _Tester, todo: Sequence[AdmissionCase], wrong: dict[Cell, str]
) -> tuple[dict[int, Callable[[int], None]], CaptureError | None]:
    """What replays each case that could be recorded, by number; and why the capture couldn't be left, if so."""
    graphs: dict[int, Callable[[int], None]] = {}

    def record(number: int, case: AdmissionCase) -> None:
        graphs[number] = tester.record(case)

    hook = tester.hooks.get("capture_ctx")
    try:
        with hook(tester.session) if hook else contextlib.nullcontext():
            for number, case in enumerate(todo):
                _note(wrong, case, functools.partial(record, number, case))
    except CaptureError as error:
        return {}, error
    return graphs, None


def _note(wrong: dict[Cell, str], case: AdmissionCase, step: Callable[[], None]) -> None:
    """Take a step, and keep why it failed, the first time for each kind of message."""
    reason = _reason(step)
    if reason:
        wrong.setdefault(case.cell, reason)


def _reason(step: Callable[[], None]) -> str:
    """Why a step failed, "" where it didn't."""
    try:
        step()
    except Exception as error:  # noqa: BLE001 - the plugin border: whatever a backend raises here is a reason not to use it
        return describe(error)[:300]
    return ""


class _Tester:
    """Makes inputs, calls the backend's hooks and compares, for one rank."""

    def __init__(
        self, hooks: Mapping[str, Callable[..., Any]], session: Any, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.hooks = hooks
        self.session = session
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def out_of_place(self, case: AdmissionCase, salt: int) -> None:
        """One call that allocates its output; the inputs must be left alone."""
        inputs = self._inputs(case, salt)
        kept = [tensor.clone() for tensor in inputs]
        self._compare(case, salt, self._call(case, inputs, in_place=False))
        if not all(map(torch.equal, inputs, kept)):
            raise ArithmeticError(f"{_what(case)}: an input was overwritten")

    def in_place(self, case: AdmissionCase, salt: int) -> None:
        """One call whose output is its input."""
        inputs = self._inputs(case, salt)
        results = self._call(case, inputs, in_place=True)
        if any(result is not out for result, out in zip(results, inputs, strict=False)):
            raise ArithmeticError(f"{_what(case)}: `out` wasn't returned")
        self._compare(case, salt, results)

    def record(self, case: AdmissionCase) -> Callable[[int], None]:
        """Record a call; what is returned replays it with other data and compares."""
        inputs = self._inputs(case, 0)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._call(case, inputs, in_place=False)

        def replay(salt: int) -> None:
            for static, fresh in zip(inputs, self._inputs(case, salt), strict=True):
                static.copy_(fresh)
            graph.replay()
            self._compare(case, salt, results)

        return replay

    def _inputs(self, case: AdmissionCase, salt: int) -> tuple[torch.Tensor, ...]:
        """The rank's tensor; for the fused operation also the residual and the weight."""
        tensor = self._pattern(case, self._values(case.cell[3], self.rank, salt))
        if case.cell[0] == "all_reduce":
            return (tensor,)
        residual = self._pattern(case, self._values(case.cell[3], self.world_size, salt))
        weight = (torch.arange(case.shape[1]) % 3 + 1).to(tensor.device, tensor.dtype)
        return tensor, residual, weight

    def _values(self, dtype: str, rank: int, salt: int) -> torch.Tensor:
        """One period of small integers that differ between ranks, whose sum over ranks and residual is exact."""
        terms, limit = self.world_size + 1, min(_EXACT.get(dtype, 4096), 4096)
        index = torch.arange(_PERIOD)
        # Mixed, so that two ranks, or one rank's data a few elements on, have nothing in common even as zeros and ones.
        mixed = (index * 7919 + rank * 104729 + salt * 31) * 2654435761 % (1 << 32)
        mixed = (mixed ^ mixed >> 15) * 2246822519 % (1 << 32) >> 13
        values = mixed % (max(limit // terms, 1) + 1)
        # In a group of more ranks than the dtype can count, only some ranks add to each element.
        return values * ((index + rank) % -(-terms // limit) == 0)

    def _pattern(self, case: AdmissionCase, values: torch.Tensor) -> torch.Tensor:
        """The period repeated to the case's shape, in its dtype and on its device."""
        device = self.device if case.cell[2] == self.device.type else torch.device(case.cell[2])
        numel = math.prod(case.shape)
        period = values.to(device, getattr(torch, case.cell[3]))
        return period.repeat(-(-numel // _PERIOD))[:numel].reshape(case.shape)

    def _call(
        self, case: AdmissionCase, inputs: tuple[torch.Tensor, ...], *, in_place: bool
    ) -> tuple[torch.Tensor, ...]:
        hook = self.hooks[case.cell[0]]
        out = inputs[0] if in_place else None
        if case.cell[0] == "all_reduce":
            return (hook(self.session, inputs[0], out),)
        results = hook(self.session, *inputs, 1e-6, 0.0, out, inputs[1] if in_place else None)
        if results is NotImplemented:
            raise NotImplementedError(f"{_what(case)}: it returned NotImplemented")
        normed, summed = results
        return normed, summed

    def _compare(self, case: AdmissionCase, salt: int, results: tuple[torch.Tensor, ...]) -> None:
        terms = self.world_size + (case.cell[0] != "all_reduce")
        total = torch.stack([self._values(case.cell[3], rank, salt) for rank in range(terms)]).sum(0)
        expected = self._pattern(case, total)
        for result in results:
            _check_kind(case, result, expected)
        _equal(case, results[-1], expected)
        if case.cell[0] == "all_reduce":
            return
        sums = expected.double()
        weight = (torch.arange(case.shape[1], device=sums.device) % 3 + 1).double()
        norm = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + 1e-6) * weight
        # Two roundings to the dtype, and fp32 arithmetic whatever the dtype.
        tolerance = max(4 * torch.finfo(expected.dtype).eps, 1e-5)
        if not torch.allclose(results[0].double(), norm, rtol=tolerance, atol=tolerance):
            raise ArithmeticError(f"{_what(case)}: the norm is wrong")


def _what(case: AdmissionCase) -> str:
    return f"{case.cell[3]} {list(case.shape)}"


def _check_kind(case: AdmissionCase, result: object, expected: torch.Tensor) -> None:
    if not isinstance(result, torch.Tensor) or result.dtype != expected.dtype or result.shape != expected.shape:
        raise ArithmeticError(f"{_what(case)}: the result isn't a tensor of that shape and dtype")


def _equal(case: AdmissionCase, result: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(result, expected):
        wrong = (result != expected).flatten()
        first = int(wrong.nonzero()[0])
        raise ArithmeticError(
            f"{_what(case)}: {int(wrong.sum())} wrong sums, the first at element {first}: "
            f"{result.flatten()[first].item()} instead of {expected.flatten()[first].item()}"
        )
