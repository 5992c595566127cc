"""What ranks do in the conformance test of sums over a quantised wire; see `cases`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._group.admission import WIRE_FLOOR, WIRE_RELATIVE
from comm_core._testing.handles import SumCall, check_sum, device_of, open_handle, synchronize
from comm_core._testing.inputs import SMALL_NBYTES, make_inputs, sizes_of
from comm_core.types import Route

__all__ = ["sums_over_a_wire_are_within_its_bound"]

# The largest message of a range, in bytes, unless it begins above half of that: on CPUs the check alone takes long.
_MOST_NBYTES = {"cuda": 64 << 20, "cpu": SMALL_NBYTES}
# Random numbers repeat after so many elements: a prime, so that they lie otherwise in each chunk.
_PERIOD = 40_009
# The magnitudes of so many neighbours have one factor, and those of the next ones another. Zeros need a scale, too.
_RUN, _FACTORS = 300, (1.0, 0.0, 2.0**-8, 16.0, 2.0**-3)
# The most elements of a chunk, which has one scale.
_CHUNK = 128

#: The bits of a sum, with the message's description.
_Bits = tuple[str, torch.Tensor]


def sums_over_a_wire_are_within_its_bound(name: str) -> bool:
    """Check what travels quantised, and that all else is exact; return whether anything does travel so.

    The second of two handles must give the bits of the first.
    """
    first, second = _sums(name), _sums(name)
    for (what, bits), (_, others) in zip(first, second, strict=True):
        assert torch.equal(bits, others), f"{what}: a rerun gives other bits"
    return bool(first)


def _sums(name: str) -> list[_Bits]:
    """Check the sums of a group that asks for the wire; return the bits of those that are quantised."""
    found: list[_Bits] = []
    with open_handle(name, wire="fp8") as backend:
        session = backend._serving.sessions.get(name)
        if session is not None and session.plugin.has("is_available"):  # without it, the backend claims no dtype
            assert not session.failed_cells, session.describe_failed_cells()
        routes = [route for route in backend.decision.routes if route.op == "all_reduce"]
        for route in routes:
            numels = _quantised_sizes(route, name)
            for numel in numels if route.mode == "eager" else numels[:: max(1, len(numels) // 3)]:
                call = _QuantisedSum(backend, device_of(backend, route), getattr(torch, route.dtype), numel)
                if route.mode == "eager":
                    found.append(call.check_eager())
                elif route.device_type == "cuda":
                    found.append(call.check_replays())
        if found:
            _check_exact_sums(backend, [route for route in routes if route.mode == "eager"])
    return found


def _is_quantised(route: Route, nbytes: int) -> bool:
    return bool(next(rule for rule in route.rules if rule.takes(nbytes)).wire)


def _quantised_sizes(route: Route, name: str) -> list[int]:
    """Return sizes that travel by the wire, in elements: the edges of its ranges, and odd ones."""
    rules = [rule for rule in route.rules if rule.wire]
    if not rules:
        return []
    itemsize = getattr(torch, route.dtype).itemsize
    most_nbytes = max(_MOST_NBYTES[route.device_type], *(2 * rule.min_nbytes for rule in rules))
    numels = set(sizes_of(route.rules, name, itemsize, most_nbytes))
    for rule in rules:
        step = math.lcm(rule.multiple_nbytes, itemsize)
        numels |= {(int(rule.min_nbytes * factor) // step | 1) * step // itemsize for factor in (1.1, 1.7, 5.3)}
    small = sorted(numel for numel in numels if numel * itemsize <= most_nbytes)
    return [numel for numel in small if _is_quantised(route, numel * itemsize)]


def _check_exact_sums(backend: comm.Backend, routes: Sequence[Route]) -> None:
    """Sum integers of all dtypes, in sizes at the edges of the wire's ranges that don't travel by it."""
    rules = [rule for route in routes for rule in route.rules if rule.wire]
    edges = {edge for rule in rules for edge in (rule.min_nbytes, rule.max_nbytes) if edge}
    for route in routes:
        dtype = getattr(torch, route.dtype)
        for edge in sorted(edge for edge in edges if edge <= 2 * SMALL_NBYTES):
            for numel in (edge // dtype.itemsize + offset for offset in (-1, 0, 1)):
                if numel > 0 and not _is_quantised(route, numel * dtype.itemsize):
                    check_sum(backend, device_of(backend, route), dtype, numel, "what doesn't travel by the wire")


class _QuantisedSum(SumCall):
    """A sum of random numbers over the wire."""

    def fill(self, salt: int) -> None:
        self._every = [_make_terms(rank, self._tensor, salt) for rank in self._members]
        self._tensor.copy_(self._mine)

    @property
    def _mine(self) -> torch.Tensor:
        return self._every[dist.get_rank()]

    def _fill_with_nans(self) -> None:
        """Let some ranks' numbers be NaN, also the message's first and last element."""
        numel, last = self._tensor.numel(), len(self._every) - 1
        for rank, place in ((last, 0), (0, numel // 3), (last, numel - 1)):
            self._every[rank][place] = math.nan
        self._tensor.copy_(self._mine)

    def check_eager(self) -> _Bits:
        result = self()
        self.check_results(result, "an eager sum")
        if self.dtype.is_floating_point:
            self._fill_with_nans()
            self.check_results(self(), "an eager sum of NaNs")
        return self._describe("an eager sum"), _bits_of(result).cpu()

    def check_replays(self) -> _Bits:
        """Replay a graph with other data, and compare with eager calls if these are quantised, too."""
        self()
        synchronize(self._backend)
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph):
            result = self()
        route = self._backend.decision.route("all_reduce", "eager", "cuda", str(self.dtype).removeprefix("torch."))
        for replay in range(3):
            self.fill(replay)
            graph.replay()
            what = f"replay {replay}"
            self.check_results(result, what)
            if _is_quantised(route, self._tensor.nbytes):
                same = torch.equal(_bits_of(result), _bits_of(self()))
                assert same, f"{self._describe(what)}: other bits than those of an eager call"
        return self._describe("a replay"), _bits_of(result).cpu()

    def check_results(self, result: Any, what: str) -> None:
        """Compare what a call returned with the exact sum, within the bound, and with the other ranks' bits."""
        what = self._describe(what)
        assert torch.equal(_bits_of(self._tensor), _bits_of(self._mine)), f"{what}: the input changed"
        nan = torch.stack([term.isnan() for term in self._every]).any(0)
        misplaced = (result.isnan() != nan).nonzero()
        assert not len(misplaced), f"{what}: element {int(misplaced[0])} is {result[misplaced[0]].item()}"
        finite = result.masked_fill(nan, 0)
        exact, allowed = _sum_and_bound(self._every)
        errors = (finite.double() - exact).abs().masked_fill(nan, 0)
        wrong = (~(errors <= allowed)).nonzero()
        assert not len(wrong), (
            f"{what}: {len(wrong)} elements are beyond the bound, the first at {int(wrong[0])}: "
            f"{finite[wrong[0]].item()} instead of {exact[wrong[0]].item()}, within {allowed[wrong[0]].item():.3g}"
        )
        bits = _bits_of(finite)
        gathered = [torch.empty_like(bits) for _ in self._every]
        dist.all_gather(gathered, bits)
        assert all(torch.equal(bits, other) for other in gathered), f"{what}: the ranks get different bits"

    def _describe(self, what: str) -> str:
        x = self._tensor
        return f"{what} over the wire: {x.numel()} elements of {x.dtype} on {x.device}"


def _make_terms(rank: int, like: torch.Tensor, salt: int) -> torch.Tensor:
    """Return a rank's numbers, of very different magnitudes, as many as in the tensor and on its device."""
    numel = min(like.numel(), _PERIOD)
    values = make_inputs(rank, numel, like.dtype, salt)
    if like.dtype.is_floating_point:
        factors = torch.tensor(_FACTORS, dtype=torch.float64)[torch.arange(numel) // _RUN % len(_FACTORS)]
        values = (values * factors).to(like.dtype)
    return values.to(like.device).repeat(-(-like.numel() // numel))[: like.numel()]


def _sum_and_bound(terms: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exact sum, and the error that `comm_core.get_backend` states for it, in float64; NaNs count as zero.

    Where chunks begin is the backend's affair, so any 128 neighbours may be one.
    """
    exact = allowed = torch.zeros((), dtype=torch.float64, device=terms[0].device)
    for term in terms:
        wide = term.double().nan_to_num(nan=0.0)
        exact = exact + wide
        magnitudes = wide.abs()
        largest = torch.nn.functional.pad(magnitudes, (_CHUNK - 1, _CHUNK - 1))
        # Maxima of 2, 4, ... 128 neighbours, and then of all that may be in a chunk with an element.
        for shift in (1, 2, 4, 8, 16, 32, 64, _CHUNK - 1):
            largest = torch.maximum(largest[:-shift], largest[shift:])
        allowed = allowed + WIRE_RELATIVE * magnitudes + WIRE_FLOOR * largest
    return exact, allowed


def _bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
