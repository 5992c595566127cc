"""The admission test: known integers through a candidate, compared with arithmetic, before anybody relies on it.

Drivers that report working peer access and then deliver wrong data exist, so no backend serves a kind of message that
it hasn't summed correctly on these devices, at the edges of the sizes that it would own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from comm_core.routes import Cell, owned
from comm_core.types import DTYPES, Route

__all__ = ["Case", "cases", "run"]

#: Sizes above this, in bytes, are tested at this size: past it a transfer has left every protocol's edge behind, and
#: the test of nine dtypes stays within seconds on a CPU. For the fused operation an eighth, since it needs fp64.
LARGEST_NBYTES = {"all_reduce": 64 << 20, "all_reduce_add_rms_norm": 8 << 20}
#: A range without an upper end is tested up to this size, in bytes.
UNBOUNDED_NBYTES = 1 << 20
# The largest integer up to which a dtype holds every integer, so that sums are exact whatever their order.
_EXACT = {"bfloat16": 256, "float16": 2048, "int8": 127, "uint8": 255}
# Period of the test pattern in elements: a prime, so that no chunk, vector or block of a kernel lines up with it.
_PERIOD = 1021
# Elements a row of the fused operation's cases: small enough for many rows at small sizes.
_HIDDEN_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One message of the admission test.

    Attributes:
        cell: its kind.
        shape: of the tensor; `[num_tokens, hidden_size]` for the fused operation.
    """

    cell: Cell
    shape: tuple[int, ...]


def cases(routes: Iterable[Route], name: str) -> tuple[Case, ...]:
    """The messages with which the backend `name` is tested: both edges of every stretch of sizes that it owns."""
    found: dict[Case, None] = {}
    for route in routes:
        cell = (route.op, route.mode, route.device_type, route.dtype)
        for index, rule in enumerate(route.rules):
            if rule.backend != name:
                continue
            step = math.lcm(DTYPES[route.dtype], rule.multiple_nbytes)
            for low, high in owned(route, index):
                top = max(low, UNBOUNDED_NBYTES) if high is None else high
                for nbytes in (low, min(top, max(low, LARGEST_NBYTES[route.op])) // step * step):
                    shape = _shape(route, nbytes, rule.hidden_multiple, rule.max_tokens, up=nbytes == low)
                    if shape is not None and _goes_to(route, shape, name):
                        found[Case(cell, shape)] = None
    return tuple(found)


def run(
    plugin_hooks: Mapping[str, Callable[..., Any]],
    session: Any,
    todo: Sequence[Case],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[Cell, str]:
    """Put every case through a backend. Collective: every rank runs every case, wrong or raising.

    Args:
        plugin_hooks: the plugin's hooks by name.
        session: what its `connect` returned.
        todo: the cases, equal on every rank.
        rank: this rank's group rank.
        world_size: ranks in the group.
        device: of the group's accelerator, else the CPU.

    Returns:
        Why a kind of message failed on this rank; empty where all is well.
    """
    tester = _Tester(plugin_hooks, session, rank, world_size, device)
    wrong: dict[Cell, str] = {}
    for salt, case in enumerate(case for case in todo if case.cell[1] == "eager"):
        reason = _reason(lambda case=case, salt=salt: tester.eager(case, salt))  # type: ignore[misc]
        if reason:
            wrong.setdefault(case.cell, reason)
    wrong.update(_run_graphs(tester, [case for case in todo if case.cell[1] == "graph"]))
    return wrong


def _run_graphs(tester: _Tester, todo: Sequence[Case]) -> dict[Cell, str]:
    """Record every case inside one capture context, leave it, then replay each graph twice with other data."""
    if not todo:
        return {}
    wrong: dict[Cell, str] = {}
    replays: list[tuple[Case, Callable[[int], None]]] = []
    hook = tester.hooks.get("capture_ctx")
    with hook(tester.session) if hook else contextlib.nullcontext():
        for case in todo:

            def record(case: Case = case) -> None:
                replays.append((case, tester.graph(case)))

            reason = _reason(record)
            if reason:
                wrong.setdefault(case.cell, reason)
    for case, replay in replays:
        for salt in (1, 2):
            reason = _reason(lambda replay=replay, salt=salt: replay(salt))  # type: ignore[misc]
            if reason:
                wrong.setdefault(case.cell, reason)
    return wrong


def _reason(step: Callable[[], None]) -> str:
    """Why a step failed, "" where it didn't."""
    try:
        step()
    except Exception as error:  # noqa: BLE001 - the plugin border: whatever a backend raises here is a reason not to use it
        return f"{type(error).__name__}: {error}"[:300]
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

    def eager(self, case: Case, salt: int) -> None:
        """Out of place, then in place; the input of the first must be left alone."""
        inputs = self._inputs(case, salt)
        kept = inputs[0].clone()
        self._compare(case, salt, self._call(case, inputs, False))
        if not torch.equal(inputs[0], kept):
            raise ArithmeticError(f"{_what(case)}: the input was overwritten")
        results = self._call(case, inputs, True)
        if results[0] is not inputs[0]:
            raise ArithmeticError(f"{_what(case)}: `out` wasn't returned")
        self._compare(case, salt, results)

    def graph(self, case: Case) -> Callable[[int], None]:
        """Record a call; what is returned replays it with other data and compares."""
        inputs = self._inputs(case, 0)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._call(case, inputs, False)

        def replay(salt: int) -> None:
            for static, fresh in zip(inputs, self._inputs(case, salt), strict=True):
                static.copy_(fresh)
            graph.replay()
            self._compare(case, salt, results)

        return replay

    def _inputs(self, case: Case, salt: int) -> tuple[torch.Tensor, ...]:
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
        values = (index * 7919 + rank * 104729 + salt * 31) % (max(limit // terms, 1) + 1)
        # In a group of more ranks than the dtype can count, only some ranks add to each element.
        return values * ((index + rank) % -(-terms // limit) == 0)

    def _pattern(self, case: Case, values: torch.Tensor) -> torch.Tensor:
        """The period repeated to the case's shape, in its dtype and on its device."""
        device = self.device if case.cell[2] == self.device.type else torch.device(case.cell[2])
        numel = math.prod(case.shape)
        period = values.to(device, getattr(torch, case.cell[3]))
        return period.repeat(-(-numel // _PERIOD))[:numel].reshape(case.shape)

    def _call(self, case: Case, inputs: tuple[torch.Tensor, ...], in_place: bool) -> tuple[torch.Tensor, ...]:
        hook = self.hooks[case.cell[0]]
        out = inputs[0] if in_place else None
        if case.cell[0] == "all_reduce":
            return (hook(self.session, inputs[0], out),)
        residual_out = inputs[1] if in_place else None
        results: tuple[torch.Tensor, ...] = hook(self.session, *inputs, 1e-6, 0.0, out, residual_out)
        return results

    def _compare(self, case: Case, salt: int, results: tuple[torch.Tensor, ...]) -> None:
        terms = self.world_size + (case.cell[0] != "all_reduce")
        total = torch.stack([self._values(case.cell[3], rank, salt) for rank in range(terms)]).sum(0)
        expected = self._pattern(case, total)
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


def _what(case: Case) -> str:
    return f"{case.cell[3]} {list(case.shape)}"


def _equal(case: Case, result: object, expected: torch.Tensor) -> None:
    if not isinstance(result, torch.Tensor) or result.dtype != expected.dtype or result.shape != expected.shape:
        raise ArithmeticError(f"{_what(case)}: the result isn't a tensor of that shape and dtype")
    if not torch.equal(result, expected):
        wrong = (result != expected).flatten()
        first = int(wrong.nonzero()[0])
        raise ArithmeticError(
            f"{_what(case)}: {int(wrong.sum())} wrong sums, the first at element {first}: "
            f"{result.flatten()[first].item()} instead of {expected.flatten()[first].item()}"
        )


def _shape(
    route: Route, nbytes: int, hidden_multiple: int, max_tokens: int | None, *, up: bool
) -> tuple[int, ...] | None:
    """A tensor's shape of `nbytes` bytes; for the fused operation the nearest whole number of rows, upwards or down."""
    itemsize = DTYPES[route.dtype]
    if route.op == "all_reduce":
        return (nbytes // itemsize,)
    hidden_size = -(-_HIDDEN_SIZE // hidden_multiple) * hidden_multiple
    num_tokens = -(-nbytes // (hidden_size * itemsize)) if up else nbytes // (hidden_size * itemsize)
    num_tokens = min(num_tokens, max_tokens or num_tokens)
    return (num_tokens, hidden_size) if num_tokens else None


def _goes_to(route: Route, shape: tuple[int, ...], name: str) -> bool:
    nbytes = math.prod(shape) * DTYPES[route.dtype]
    if route.op == "all_reduce":
        return route.backend_for(nbytes) == name
    return route.backend_for(nbytes, *shape) == name
