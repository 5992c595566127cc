"""The admission test: a candidate sums known integers, and its results are compared with the exact sums.

Some drivers report working peer access and then deliver wrong data. So a backend serves a kind of message only after it
has summed it correctly on these devices, at the edges of the sizes that it would own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from comm_core._group.failures import Failures, describe_wrong
from comm_core._group.ordered_values import mixed_bits, ordered_values
from comm_core._group.quant_forms import EPS, QuantCall, call_every_form, check_bits
from comm_core._handle.rank_order import sum_in_rank_order
from comm_core._plan.cases import AdmissionCase
from comm_core.errors import CaptureError

__all__ = ["WIRE_FLOOR", "WIRE_RELATIVE", "run_cases"]

# The largest n such that the dtype holds every integer up to n exactly: sums up to n are exact in any order.
_MAX_EXACT_INT = {"bfloat16": 256, "float16": 2048, "int8": 127, "uint8": 255}
# Period of the test pattern in elements: a prime, so that no chunk, vector or block of a kernel lines up with it.
_PERIOD = 1021
#: The error bound of the wire "fp8": a part of the terms' magnitudes, and one of the largest in each term's chunk; see
#: `comm_core.get_backend`.
WIRE_RELATIVE, WIRE_FLOOR = 0.14, 2.0**-15
# The inputs' names in the hooks.
_INPUTS = ("tensor", "residual", "weight")
# A rank sends this instead of the numbers of its recorded cases if `capture_ctx` raised on exit.
_CAPTURE_FAILED = -1


def run_cases(
    plugin_hooks: Mapping[str, Callable[..., Any]],
    session: Any,
    cases: Sequence[AdmissionCase],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    all_gather: Callable[[list[int]], Sequence[Sequence[int]]],
    end_step: Callable[[str], None],
    failures: Failures | None = None,
    ordered: bool = False,
) -> Failures:
    """Run every case through a backend. Collective: every rank makes every call, even after a failed one.

    Args:
        plugin_hooks: the plugin's hooks by name.
        session: the result of its `connect`.
        cases: the messages to test, equal on every rank.
        rank: this rank's group rank.
        world_size: ranks in the group.
        device: the group's accelerator, else the CPU.
        all_gather: gathers every rank's value, by group rank; called only for cases of the mode "graph".
        end_step: called at the end of each step with the reason why it failed, "" if it succeeded; may raise to end the
            test.
        failures: what to add the failures to; by default a new object.
        ordered: sum floats for which the order of the ranks and every rounding count, not integers; the expected bits
            are those of "rank_order_fp32" (`comm_core.Available`).

    Returns:
        For each kind of message that failed on this rank, the reason.
    """
    tester = _Tester(plugin_hooks, session, rank, world_size, device, ordered=ordered)
    failures = Failures() if failures is None else failures
    run_step = functools.partial(_run_step, failures, end_step)
    eager = [case for case in cases if case.cell[1] == "eager"]
    steps = itertools.product(eager, (tester.out_of_place, tester.in_place))
    # Each call has different data, so that the previous call's output can't pass for the result.
    for salt, (case, step) in enumerate(steps):
        run_step(case, functools.partial(step, case, salt))
    graphs = [case for case in cases if case.cell[1] == "graph"]
    if graphs:
        _run_graphs(tester, graphs, run_step, all_gather)
    return failures


def _run_graphs(
    tester: _Tester,
    cases: Sequence[AdmissionCase],
    run_step: Callable[[AdmissionCase, Callable[[], None]], None],
    all_gather: Callable[[list[int]], Sequence[Sequence[int]]],
) -> None:
    """Record every case inside one capture context, then replay each graph twice with different data.

    If leaving the context fails, all cases are recorded once more: a backend that couldn't register an input may use a
    plan without registration from then on.
    """
    for is_last in (False, True):
        graphs, failure = _record(tester, cases, run_step)
        gathered = all_gather([_CAPTURE_FAILED] if failure else sorted(graphs))
        if not any(_CAPTURE_FAILED in numbers for numbers in gathered):
            break
        if is_last:
            raise failure or CaptureError("capture_ctx raised on exit on another rank")
    # The replay of a graph that only some ranks recorded would wait for the other ranks forever.
    on_every_rank = set(graphs).intersection(*gathered)
    for number, salt in itertools.product(sorted(on_every_rank), (1, 2)):
        run_step(cases[number], functools.partial(graphs[number], salt))


def _record(
    tester: _Tester,
    cases: Sequence[AdmissionCase],
    run_step: Callable[[AdmissionCase, Callable[[], None]], None],
) -> tuple[dict[int, Callable[[int], None]], CaptureError | None]:
    """Record the cases; return the recorded ones' replay functions, by number, and the error on exit, if any."""
    graphs: dict[int, Callable[[int], None]] = {}

    def record(number: int, case: AdmissionCase) -> None:
        graphs[number] = tester.record(case)

    hook = tester.hooks.get("capture_ctx")
    try:
        with hook(tester.session) if hook else contextlib.nullcontext():
            for number, case in enumerate(cases):
                run_step(case, functools.partial(record, number, case))
    except CaptureError as error:
        return {}, error
    return graphs, None


def _run_step(
    failures: Failures, end_step: Callable[[str], None], case: AdmissionCase, step: Callable[[], None]
) -> None:
    """Run a step; if it raises, keep the reason, unless its kind of message has one already."""
    reason = ""
    try:
        step()
    except Exception as error:  # noqa: BLE001 - plugin boundary: any error of a backend here is a reason not to use it
        reason = failures.add(case.cell, error)
    end_step(reason)


class _Tester:
    """One rank's test: makes the inputs, calls the backend's hooks and compares the results."""

    def __init__(
        self,
        hooks: Mapping[str, Callable[..., Any]],
        session: Any,
        rank: int,
        world_size: int,
        device: torch.device,
        *,
        ordered: bool = False,
    ) -> None:
        self.hooks = hooks
        self.session = session
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.ordered = ordered

    def out_of_place(self, case: AdmissionCase, salt: int) -> None:
        """Test a call that allocates its output; it must not change the inputs."""
        inputs = self._inputs(case, salt)
        copies = [tensor.clone() for tensor in inputs]
        self._compare(case, salt, self._call(case, inputs, in_place=False))
        for name, tensor, copy in zip(_INPUTS, inputs, copies, strict=False):
            if not torch.equal(tensor, copy):
                raise ArithmeticError(f"{_label(case)}: `{name}` was overwritten")

    def in_place(self, case: AdmissionCase, salt: int) -> None:
        """Test a call whose output is its input."""
        inputs = self._inputs(case, salt)
        results = self._call(case, inputs, in_place=True)
        if not isinstance(results[0], QuantCall):
            for name, result, out in zip(("out", "residual_out"), results, inputs, strict=False):
                if result is not out:
                    raise ArithmeticError(f"{_label(case)}: `{name}` wasn't returned")
        self._compare(case, salt, results)

    def record(self, case: AdmissionCase) -> Callable[[int], None]:
        """Record a call; return a function that replays it with different data and compares the result."""
        inputs = self._inputs(case, 0)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._call(case, inputs, in_place=False)

        def replay(salt: int) -> None:
            for recorded, new in zip(inputs, self._inputs(case, salt), strict=True):
                recorded.copy_(new)
            graph.replay()
            self._compare(case, salt, results)

        return replay

    def _inputs(self, case: AdmissionCase, salt: int) -> tuple[torch.Tensor, ...]:
        """Make the rank's tensor; for the fused operation also the residual and the weight."""
        tensor = self._pattern(case, self._values(case.cell[3], self.rank, salt))
        if case.cell[0] == "all_reduce":
            return (tensor,)
        residual = self._pattern(case, self._values(case.cell[3], self.world_size, salt))
        return tensor, residual, _weight(case).to(tensor.device, tensor.dtype)

    def _values(self, dtype: str, rank: int, salt: int) -> torch.Tensor:
        """Return one period of the values of a rank, which differ between ranks; the residual counts as one more rank.

        They are small integers, whose sum is exact; or, where the order counts, floats of unlike exponents.
        """
        if self.ordered and "float" in dtype:
            return ordered_values(dtype, rank, self.world_size + 1, salt, _PERIOD)
        terms, limit = self.world_size + 1, min(_MAX_EXACT_INT.get(dtype, 4096), 4096)
        index = torch.arange(_PERIOD)
        values = mixed_bits(index, rank, salt) % (max(limit // terms, 1) + 1)
        # If even ones of all ranks would add up to more than the limit, only some ranks contribute to each element.
        return values * ((index + rank) % -(-terms // limit) == 0)

    def _pattern(self, case: AdmissionCase, values: torch.Tensor) -> torch.Tensor:
        """Repeat the period to the case's shape, in its dtype and on its device."""
        device = self.device if case.cell[2] == self.device.type else torch.device(case.cell[2])
        numel = math.prod(case.shape)
        period = values.to(device, getattr(torch, case.cell[3]))
        return period.repeat(-(-numel // _PERIOD))[:numel].reshape(case.shape)

    def _call(self, case: AdmissionCase, inputs: tuple[torch.Tensor, ...], *, in_place: bool) -> Sequence[Any]:
        hook = self.hooks[case.cell[0]]
        out = inputs[0] if in_place else None
        if case.cell[0] == "all_reduce":
            return (hook(self.session, inputs[0], out),)
        if case.cell[0] == "all_reduce_add_rms_norm_quant":
            reference = None
            if self.ordered:  # some of a deterministic group's calls are composed, and have the fused call's norm
                fused = dataclasses.replace(case, cell=("all_reduce_add_rms_norm", *case.cell[1:]))
                reference, _ = self._call(fused, inputs, in_place=False)
            return call_every_form(hook, self.session, inputs, in_place=in_place, reference=reference)
        results = hook(self.session, *inputs, EPS, 0.0, out, inputs[1] if in_place else None)
        if results is NotImplemented:
            raise NotImplementedError(f"{_label(case)}: it returned NotImplemented")
        normed, summed = results
        return normed, summed

    def _compare(self, case: AdmissionCase, salt: int, results: Sequence[Any]) -> None:
        if isinstance(results[0], QuantCall):
            for call in results:
                pair = (call.summed,) if call.normed is None else (call.normed, call.summed)
                self._compare(case, salt, pair)
            check_bits(results)
            return
        terms = self.world_size + (case.cell[0] != "all_reduce")
        values = [self._values(case.cell[3], rank, salt) for rank in range(terms)]
        total = sum_in_rank_order(values) if self.ordered else torch.stack(values).sum(0)
        expected = self._pattern(case, total)
        for result in results:
            _check_shape_and_dtype(case, result, expected)
        if case.wire:
            _check_close(case, results[-1], expected, terms)
        else:
            _check_equal(case, results[-1], expected)
        if len(results) == 1:
            return
        _check_norm(case, results[0], expected.double())


def _weight(case: AdmissionCase) -> torch.Tensor:
    """Return the weight of a fused case's norm: small integers, on the CPU."""
    return torch.arange(case.shape[1]) % 3 + 1


def _label(case: AdmissionCase) -> str:
    return f"{case.cell[3]} {list(case.shape)}"


def _check_shape_and_dtype(case: AdmissionCase, result: object, expected: torch.Tensor) -> None:
    if isinstance(result, torch.Tensor):
        came = f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
        is_right = result.dtype == expected.dtype and result.shape == expected.shape
    else:
        came, is_right = f"a {type(result).__name__}", False
    if not is_right:
        raise ArithmeticError(f"{_label(case)}: the result is {came}, not a tensor of that dtype and shape")


def _check_close(case: AdmissionCase, result: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Check the error bound of the wire "fp8" (`comm_core.get_backend`) for sums of terms that aren't negative."""
    sums = expected.double()
    # No rank's term is larger than the largest sum.
    excess = (result.double() - sums).abs() - WIRE_RELATIVE * sums - WIRE_FLOOR * terms * sums.amax()
    wrong = ~(excess <= 0)
    if bool(wrong.any()):
        text = describe_wrong(f"sums beyond the error bound of the {case.wire} wire", wrong, result, expected)
        raise ArithmeticError(f"{_label(case)}: {text}")


def _check_equal(case: AdmissionCase, result: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(result, expected):
        raise ArithmeticError(f"{_label(case)}: {describe_wrong('wrong sums', result != expected, result, expected)}")


def _check_norm(case: AdmissionCase, result: torch.Tensor, sums: torch.Tensor) -> None:
    """Check the norm of a fused case's sums, which are in float64."""
    norm = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + EPS) * _weight(case).to(sums.device)
    # Two roundings to the dtype, plus the error of fp32 arithmetic for every dtype.
    tolerance = max(4 * torch.finfo(result.dtype).eps, 1e-5)
    wrong = ~torch.isclose(result.double(), norm, rtol=tolerance, atol=tolerance)
    if bool(wrong.any()):
        raise ArithmeticError(f"{_label(case)}: {describe_wrong('wrong norms', wrong, result, norm)}")
