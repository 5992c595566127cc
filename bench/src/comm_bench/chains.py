"""The measured calls and their expected results.

Every call of a chain reads the output of the call before it. A call that starts before its input is ready, or that is
skipped, makes the last output wrong; that output is compared exactly. Before the values leave the dtype's range, the
chain restarts: copies reset the buffers to integers that differ between ranks. A second, untimed run of the same calls
writes new integers to each call's input at the last moment; all its results are compared too, and those of quantised
calls also bit for bit with a quantisation of the contender's own norm, if it promises that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from comm_core import fallback

from comm_bench.cases import GROUP_SIZE, BenchCase, Pattern, first_fused_sum, fused_growth, pattern_of
from comm_bench.contenders import Contender, Job, State

__all__ = ["Chain", "Check", "Spacer", "initial_state"]

# Calls in the untimed check, each with inputs of its own.
_CHECKED_CALLS = 4
# The number of times that decoy values are written to the input of a checked call before the real ones.
_DECOYS = 8
# A norm is wrong if its error is above both: this many epsilons of the dtype, and a bound for fp32 arithmetic.
_NORM_EPSILONS = 4
_NORM_TOLERANCE = 1e-5
# The given scale of "fp8_static": not a power of two, and a norm of 1 isn't near the midpoint of two FP8 values.
_SCALE = 0.015
# Values repeat after this many elements. A prime: no two blocks or vectors of a kernel get the same values.
_PERIOD = 65521
_SIGNS = Pattern(1, 0, disjoint=False, length=1)


class Spacer:
    """A kernel on one element of its own, to run between two calls of a chain."""

    def __init__(self, case: BenchCase) -> None:
        self._element = torch.zeros(1, device=case.device_type)

    def run(self) -> None:
        """Launch the kernel."""
        self._element.add_(1)


class Chain:
    """Dependent calls of one contender on one case.

    Attributes:
        length: the number of calls before a restart.
        has_spacers: whether a spacer follows each call.
        buffers: the first call's inputs.
    """

    def __init__(self, contender: Contender, case: BenchCase, job: Job) -> None:
        pattern = pattern_of(case.op, case.dtype, job.world_size)
        self.length = pattern.length
        self.has_spacers = contender.needs_spacer(case)
        self._spacer = Spacer(case)
        self.buffers = contender.inputs(case)
        self._call = _bind(contender, case, _unit_weight(case))
        self._outputs: State = ()
        self._case = case
        self._job = job
        self._pattern = pattern
        self._start = initial_state(case, job)
        self._state: State = ()

    def run(self, calls: int) -> None:
        """Make this many calls."""
        for index in range(calls):
            if index % self.length == 0:
                for buffer, values in zip(self.buffers, self._start, strict=True):
                    buffer.copy_(values)
                self._state = self.buffers
            self._outputs = self._call(self._state)
            # Quantised norms can't be reduced; see `fused_growth`.
            self._state = (self.buffers[0], self._outputs[-1]) if self._case.quant else self._outputs
            if self.has_spacers:
                self._spacer.run()

    def restarts(self, calls: int) -> int:
        """Return how often `run` copies the initial values."""
        return -(-calls // self.length)

    def count_wrong(self, calls: int) -> int:
        """Count the elements of the last output that differ from the result of `calls` calls."""
        done, world_size = (calls - 1) % self.length, self._job.world_size
        if self._case.fused:
            sign = _integers(self._case, _SIGNS, 0, 1) * 2 - 1
            growth = fused_growth(self._case.op, world_size, self._pattern.largest)
            total = sign * (first_fused_sum(world_size, self._pattern.largest) + growth * done)
            wrong = _count_wrong_norms(self._case, self._outputs[:-1], _fill_shape(self._case, sign))
            if self._case.dtype == "float64" and not self._case.quant:
                # In fp64 the norm's epsilon changes its ±1 visibly, and so the next sum.
                return wrong + _count_far(self._outputs[-1], _fill_shape(self._case, total))
            return wrong + _count_unequal(self._case, self._outputs[-1], total)
        total = _sum_over(range(world_size), self._case, self._pattern, world_size, 0)
        if self._outputs[0].is_floating_point():
            # Within the chain's length the product fits fp64, even if its factors do not.
            total *= float(Fraction(world_size) ** done * Fraction(2) ** self._pattern.exponent)
        else:
            total = total.long() * world_size**done
        return _count_unequal(self._case, self._outputs[0], total)


class Check:
    """A few independent calls with all their results compared.

    Each call's input is written just before the call, after decoys. A CUDA graph can record `run`; `fill` then sets the
    values for the next replay.
    """

    def __init__(self, contender: Contender, case: BenchCase, job: Job, buffers: State) -> None:
        dtype = getattr(torch, case.dtype)
        self._case = case
        self._job = job
        self._buffers = buffers
        self._pattern = pattern_of("all_reduce", case.dtype, job.world_size)
        # Weights from 1 to 3: a kernel that ignores them gives a wrong result.
        self._weight = _unit_weight(case)
        if self._weight is not None:
            self._weight += (torch.arange(case.shape[1], device=case.device_type) % 3).to(dtype)
        self._call = _bind(contender, case, self._weight)
        self._contender = contender
        self._inputs = [tuple(map(torch.empty_like, buffers)) for _ in range(_CHECKED_CALLS)]
        self._results = [_like_outputs(case, buffers) for _ in range(_CHECKED_CALLS)]
        self._decoy = torch.ones(case.shape, dtype=dtype, device=case.device_type)

    def fill(self, salt: int) -> None:
        """Set new inputs, and overwrite the old results."""
        for number, (inputs, results) in enumerate(zip(self._inputs, self._results, strict=True)):
            # The residual is the same on every rank.
            for rank, values in zip((self._job.rank, self._job.world_size), inputs, strict=False):
                integers = _integers(self._case, self._pattern, rank, self._job.world_size, salt + number)
                values.copy_(_fill_shape(self._case, integers))
            for result in results:
                result.fill_(77)

    def run(self) -> None:
        """Make the calls."""
        for inputs, results in zip(self._inputs, self._results, strict=True):
            for buffer, values in zip(self._buffers, inputs, strict=True):
                # A contender that doesn't wait for its input reads these decoys.
                for _ in range(_DECOYS):
                    buffer.copy_(self._decoy)
                buffer.copy_(values)
            # Overwrite the memory that the next output probably gets, so that it holds no earlier result.
            spare = self._decoy.clone()
            del spare
            for result, output in zip(results, self._call(self._buffers), strict=True):
                result.copy_(output)

    def count_wrong(self, salt: int) -> int:
        """Count the elements that differ from the results expected after `fill(salt)`. Collective."""
        world_size = self._job.world_size
        wrong = 0
        for number, results in enumerate(self._results):
            ranks = range(world_size + len(self._buffers) - 1)
            total = _sum_over(ranks, self._case, self._pattern, world_size, salt + number)
            wrong += _count_unequal(self._case, results[-1], total)
            if self._weight is not None:
                sums = _fill_shape(self._case, total)
                norm = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + 1e-6) * self._weight.double()
                wrong += _count_wrong_norms(self._case, results[:-1], norm)
            wrong += self._count_other_bits(self._inputs[number], results)
        return wrong

    def _count_other_bits(self, inputs: State, results: State) -> int:
        """Count the values and scales with other bits than a quantisation of the contender's own norm."""
        if self._case.quant is None or self._weight is None:
            return 0
        scale = _given_scale(self._case)
        separate = self._contender.call_separately(inputs, self._weight, self._case.quant, scale)
        pairs = () if separate is None else zip(results[:-1], separate[:-1], strict=True)
        return sum(int((_bits(found) != _bits(expected)).sum()) for found, expected in pairs)


def initial_state(case: BenchCase, job: Job) -> State:
    """Return a chain's initial values on this rank; see `Pattern`."""
    pattern, dtype = pattern_of(case.op, case.dtype, job.world_size), getattr(torch, case.dtype)
    if case.fused:
        sign = _integers(case, _SIGNS, 0, 1) * 2 - 1
        return _fill_shape(case, (sign * (job.rank % pattern.largest + 1)).to(dtype)), _fill_shape(case, sign.to(dtype))
    values = _integers(case, pattern, job.rank, job.world_size) * 2.0**pattern.exponent
    return (_fill_shape(case, values.to(dtype)),)


def _bind(contender: Contender, case: BenchCase, weight: torch.Tensor | None) -> Callable[[State], State]:
    in_place = case.place == "in"
    quant, scale = case.quant, _given_scale(case)
    if quant is not None and weight is not None:
        return lambda state: contender.call_quant(state, weight, quant, scale, in_place=in_place)
    return lambda state: contender.call(state, weight, in_place=in_place)


def _unit_weight(case: BenchCase) -> torch.Tensor | None:
    """Return the fused operation's weight, all ones; None for a plain sum."""
    if not case.fused:
        return None
    return torch.ones(case.shape[1], dtype=getattr(torch, case.dtype), device=case.device_type)


def _given_scale(case: BenchCase) -> torch.Tensor | None:
    """Return the scale that the caller of a quantised operation gives; None if its calls find their scales."""
    return torch.full((1,), _SCALE, device=case.device_type) if case.quant == "fp8_static" else None


def _like_outputs(case: BenchCase, inputs: State) -> State:
    """Return tensors like the outputs of a call: like its inputs, or with the quantised values, scales and the sum."""
    if case.quant is None:
        return tuple(map(torch.empty_like, inputs))
    rows, width = case.shape
    groups = {"fp8_per_token": 1, "fp8_per_group": width // GROUP_SIZE}
    scales = (rows, groups[case.quant]) if case.quant in groups else (1,)
    values = torch.empty_like(inputs[0], dtype=torch.float8_e4m3fn)
    return values, torch.empty(scales, device=case.device_type), torch.empty_like(inputs[1])


def _integers(case: BenchCase, pattern: Pattern, rank: int, world_size: int, salt: int = 0) -> torch.Tensor:
    """Return one period of a rank's integers in fp64: a hash of the element's index, the rank and the salt."""
    index = torch.arange(min(_PERIOD, case.count), device=case.device_type)
    mixed = (index * 7919 + rank * 104729 + salt * 15485863) * 2654435761 % (1 << 32)
    mixed = (mixed ^ mixed >> 15) * 2246822519 % (1 << 32) >> 13
    values = mixed % (pattern.largest + 1)
    if pattern.disjoint:
        values = values * ((index + rank) % world_size == 0)
    return values.double()


def _sum_over(ranks: Sequence[int], case: BenchCase, pattern: Pattern, world_size: int, salt: int) -> torch.Tensor:
    """Return one period of the sum of these ranks' integers."""
    return torch.stack([_integers(case, pattern, rank, world_size, salt) for rank in ranks]).sum(0)


def _fill_shape(case: BenchCase, values: torch.Tensor) -> torch.Tensor:
    """Repeat a period of values to fill the case's shape."""
    return values.repeat(-(-case.count // len(values)))[: case.count].reshape(case.shape)


def _count_unequal(case: BenchCase, result: torch.Tensor, expected: torch.Tensor) -> int:
    return int((result != _fill_shape(case, expected.to(result.dtype))).sum())


def _count_far(result: torch.Tensor, expected: torch.Tensor) -> int:
    tolerance = _tolerance(result.dtype)
    return int((~torch.isclose(result.double(), expected, rtol=tolerance, atol=tolerance)).sum())


def _count_wrong_norms(case: BenchCase, results: State, expected: torch.Tensor) -> int:
    """Count the wrong elements of a norm; of a quantised one, values farther than a step from the expected, and scales.

    A norm within its tolerance is at most a step off where it is quantised: a step is at least 1/16 of a value.
    """
    if case.quant is None:
        return _count_far(results[0], expected)
    dtype, given = getattr(torch, case.dtype), _given_scale(case)
    scales = torch.empty_like(results[1]) if given is None else given
    values, scales = fallback.quantize(expected.to(dtype), case.quant, scales)
    steps = (_ordinal(results[0]) - _ordinal(values)).abs()
    far = ~torch.isclose(results[1], scales, rtol=_tolerance(dtype), atol=0.0)
    return int((steps > 1).sum() + far.sum())


def _tolerance(dtype: torch.dtype) -> float:
    return max(_NORM_EPSILONS * torch.finfo(dtype).eps, _NORM_TOLERANCE)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int8 if tensor.itemsize == 1 else torch.int32)


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Number FP8 values by order, both zeros 0 and NaN beyond all: a difference of 1 is a step."""
    bits = values.view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 127), bits)
