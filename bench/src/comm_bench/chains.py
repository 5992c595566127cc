"""The calls that are measured, and what must come of them.

Every call of a chain reads what the call before it wrote, so nothing can start before its input is there, and nothing
can be left out unnoticed: the last output is compared exactly. Chains start anew, by copies from rank-distinct
integers, before the dtype's range ends. A second, untimed run of the same calls gets new integers at every call, late,
and is compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from comm_bench.cases import BenchCase, Pattern, fused_start, pattern_of
from comm_bench.contenders import Contender, Job, State

__all__ = ["Chain", "Check", "Spacer", "start"]

# Calls of the untimed check, each with inputs of its own.
_CHECKED_CALLS = 4
# The input of a checked call holds something else, and is overwritten with it this often, before it gets its values.
_DECOYS = 8
# The relative error of a norm that counts as wrong: of the dtype, in its epsilons, and of fp32 arithmetic.
_NORM_EPSILONS = 4
_NORM_TOLERANCE = 1e-5
# Values repeat after this many elements: a prime, so that no block or vector of a kernel is a period apart.
_PERIOD = 65521
_SIGNS = Pattern(1, 0, alone=False, length=1)


class Spacer:
    """A kernel of one element that has nothing to do with any call."""

    def __init__(self, case: BenchCase) -> None:
        self._element = torch.zeros(1, device=case.device_type)

    def run(self) -> None:
        """Launch it."""
        self._element.add_(1)


class Chain:
    """Dependent calls of one contender on one case.

    Attributes:
        length: calls before it starts anew.
        spaced: whether a spacer follows each call.
        buffers: what the first call reads.
    """

    def __init__(self, contender: Contender, case: BenchCase, job: Job) -> None:
        pattern = pattern_of(case.op, case.dtype, job.world_size)
        self.length = pattern.length
        self.spaced = contender.spaced(case)
        self._spacer = Spacer(case)
        self.buffers = contender.inputs(case)
        self._call = _bound(contender, case, _ones(case))
        self._case = case
        self._job = job
        self._pattern = pattern
        self._start = start(case, job)
        self._state: State = ()

    def run(self, calls: int) -> None:
        """Make so many calls."""
        for index in range(calls):
            if index % self.length == 0:
                for buffer, values in zip(self.buffers, self._start, strict=True):
                    buffer.copy_(values)
                self._state = self.buffers
            self._state = self._call(self._state)
            if self.spaced:
                self._spacer.run()

    def restarts(self, calls: int) -> int:
        """How often `run` copies the start."""
        return -(-calls // self.length)

    def wrong(self, calls: int) -> int:
        """Elements of the last output that aren't what `calls` calls make of the start."""
        done, world_size = (calls - 1) % self.length, self._job.world_size
        if self._case.fused:
            sign = _integers(self._case, _SIGNS, 0, 1) * 2 - 1
            total = sign * (fused_start(world_size, self._pattern.largest) + world_size * done)
            wrong = _far(self._state[0], _laid_out(self._case, sign))
            if self._case.dtype == "float64":
                # The norm's epsilon shows in its ±1, and the next sum has that.
                return wrong + _far(self._state[1], _laid_out(self._case, total))
            return wrong + _unequal(self._case, self._state[1], total)
        total = _sum_over(range(world_size), self._case, self._pattern, world_size, 0)
        if self._state[0].is_floating_point():
            # A chain's length keeps this within fp64, though its factors may not be.
            total *= float(Fraction(world_size) ** done * Fraction(2) ** self._pattern.exponent)
        else:
            total = total.long() * world_size**done
        return _unequal(self._case, self._state[0], total)


class Check:
    """A few calls that don't depend on each other, of which every element is compared.

    Each gets its input late, after decoys; `run` can be recorded, and its replays be given other values by `fill`.
    """

    def __init__(self, contender: Contender, case: BenchCase, job: Job, buffers: State) -> None:
        dtype = getattr(torch, case.dtype)
        self._case = case
        self._job = job
        self._buffers = buffers
        self._pattern = pattern_of("all_reduce", case.dtype, job.world_size)
        # Weights of 1 to 3, so that one that is left out is noticed.
        self._weight = _ones(case)
        if self._weight is not None:
            self._weight += (torch.arange(case.shape[1], device=case.device_type) % 3).to(dtype)
        self._call = _bound(contender, case, self._weight)
        self._inputs = [tuple(map(torch.empty_like, buffers)) for _ in range(_CHECKED_CALLS)]
        self._results = [tuple(map(torch.empty_like, buffers)) for _ in range(_CHECKED_CALLS)]
        self._decoy = torch.ones(case.shape, dtype=dtype, device=case.device_type)

    def fill(self, salt: int) -> None:
        """New inputs, and results that hold nothing of the old ones."""
        for number, (inputs, results) in enumerate(zip(self._inputs, self._results, strict=True)):
            # The residual is the same on every rank.
            for rank, (values, result) in zip(
                (self._job.rank, self._job.world_size), zip(inputs, results, strict=True), strict=False
            ):
                fresh = _integers(self._case, self._pattern, rank, self._job.world_size, salt + number)
                values.copy_(_laid_out(self._case, fresh))
                result.fill_(77)

    def run(self) -> None:
        """Make the calls."""
        for inputs, results in zip(self._inputs, self._results, strict=True):
            for buffer, values in zip(self._buffers, inputs, strict=True):
                # Whoever doesn't wait for its input finds this instead.
                for _ in range(_DECOYS):
                    buffer.copy_(self._decoy)
                buffer.copy_(values)
            # The memory that a new output is likely to get holds none of the earlier ones.
            spare = self._decoy.clone()
            del spare
            for result, output in zip(results, self._call(self._buffers), strict=True):
                result.copy_(output)

    def wrong(self, salt: int) -> int:
        """Elements that aren't what follows from `fill(salt)`."""
        world_size = self._job.world_size
        wrong = 0
        for number, results in enumerate(self._results):
            ranks = range(world_size + len(results) - 1)
            total = _sum_over(ranks, self._case, self._pattern, world_size, salt + number)
            wrong += _unequal(self._case, results[-1], total)
            if self._weight is not None:
                sums = _laid_out(self._case, total)
                norm = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + 1e-6) * self._weight.double()
                wrong += _far(results[0], norm)
        return wrong


def start(case: BenchCase, job: Job) -> State:
    """What a chain starts from on this rank; see `Pattern`."""
    pattern, dtype = pattern_of(case.op, case.dtype, job.world_size), getattr(torch, case.dtype)
    if case.fused:
        sign = _integers(case, _SIGNS, 0, 1) * 2 - 1
        return _laid_out(case, (sign * (job.rank % pattern.largest + 1)).to(dtype)), _laid_out(case, sign.to(dtype))
    values = _integers(case, pattern, job.rank, job.world_size) * 2.0**pattern.exponent
    return (_laid_out(case, values.to(dtype)),)


def _bound(contender: Contender, case: BenchCase, weight: torch.Tensor | None) -> Callable[[State], State]:
    in_place = case.place == "in"
    return lambda state: contender.call(state, weight, in_place=in_place)


def _ones(case: BenchCase) -> torch.Tensor | None:
    """A weight, for the fused operation."""
    if not case.fused:
        return None
    return torch.ones(case.shape[1], dtype=getattr(torch, case.dtype), device=case.device_type)


def _integers(case: BenchCase, pattern: Pattern, rank: int, world_size: int, salt: int = 0) -> torch.Tensor:
    """One period of a rank's integers, in fp64: mixed, so that ranks, neighbours and salts have nothing in common."""
    index = torch.arange(min(_PERIOD, case.count), device=case.device_type)
    mixed = (index * 7919 + rank * 104729 + salt * 15485863) * 2654435761 % (1 << 32)
    mixed = (mixed ^ mixed >> 15) * 2246822519 % (1 << 32) >> 13
    values = mixed % (pattern.largest + 1)
    if pattern.alone:
        values = values * ((index + rank) % world_size == 0)
    return values.double()


def _sum_over(ranks: Sequence[int], case: BenchCase, pattern: Pattern, world_size: int, salt: int) -> torch.Tensor:
    """One period of the sum of these ranks' integers."""
    return torch.stack([_integers(case, pattern, rank, world_size, salt) for rank in ranks]).sum(0)


def _laid_out(case: BenchCase, values: torch.Tensor) -> torch.Tensor:
    """A period repeated to the case's shape."""
    return values.repeat(-(-case.count // len(values)))[: case.count].reshape(case.shape)


def _unequal(case: BenchCase, result: torch.Tensor, expected: torch.Tensor) -> int:
    return int((result != _laid_out(case, expected.to(result.dtype))).sum())


def _far(result: torch.Tensor, expected: torch.Tensor) -> int:
    tolerance = max(_NORM_EPSILONS * torch.finfo(result.dtype).eps, _NORM_TOLERANCE)
    return int((~torch.isclose(result.double(), expected, rtol=tolerance, atol=tolerance)).sum())
