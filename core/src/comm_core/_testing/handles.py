"""Handles of a backend under test, which of its calls it serves, and checks of these calls."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._testing import inputs
from comm_core._testing.inputs import make_integers, sizes_of, sum_exactly
from comm_core.types import Route

__all__ = [
    "FUSED",
    "WARM_HANDLES",
    "FusedCall",
    "SumCall",
    "call_and_check",
    "check_sum",
    "describe",
    "device_of",
    "eager_cells",
    "first_call",
    "fused_cells",
    "graph_calls",
    "open_handle",
    "prepare_if_needed",
    "synchronize",
    "warnings_of_core",
]

#: The fused operation.
FUSED = "all_reduce_add_rms_norm"
#: The shape, in tokens and elements, for which a backend is prepared that serves nothing before that.
_PREPARED = (129, 4096)
_EPS = 1e-6
# Rows and hidden sizes of the fused operation, as far as the backend's rules take them.
_TOKENS = (1, 2, 3, 7, 16, 65, 128, 129)
_HIDDEN = (1, 3, 8, 16, 24, 64, 128, 1000, 1024, 2880, 4096, 5120, 8192)
#: After so many handles, the process has loaded and cached all that it keeps.
WARM_HANDLES = 3


def describe(name: str) -> dict[str, Any]:
    """Negotiate a group, and return the outcome for the backend."""
    try:
        backend = comm.get_backend()
    except comm.CommError as error:
        return {"verdict": "failed", "reason": str(error), "dropped": "", "hooks": [], "fused_only": False}
    prepare_if_needed(backend, name)
    candidate = backend.decision.candidate(name)
    session = backend._serving.sessions.get(name)
    outcome = {
        "verdict": "absent" if candidate is None else candidate.verdict,
        "reason": "" if candidate is None else candidate.reason,
        "dropped": "" if session is None or not session.failed_cells else session.describe_failed_cells(),
        "hooks": [] if session is None else sorted(session.plugin.hooks),
        "fused_only": _served_ops(backend, name) == {FUSED},
    }
    comm.close()
    return outcome


def _served_ops(backend: comm.Backend, name: str) -> set[str]:
    """Return the operations of which the backend serves some message."""
    return {route.op for route in backend.decision.routes if any(rule.backend == name for rule in route.rules)}


def prepare_if_needed(backend: comm.Backend, name: str) -> None:
    """Prepare for a shape of each dtype in turn until a backend serves that could, but needs this first."""
    max_tokens, hidden_size = _PREPARED
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        candidate = backend.decision.candidate(name)
        if candidate is not None and candidate.verdict == "standby":
            comm.pre_capture_init(max_tokens=max_tokens, hidden_size=hidden_size, dtype=dtype)


def eager_cells(
    backend: comm.Backend, name: str, most_nbytes: int = inputs.SMALL_NBYTES, least_nbytes: int = 1
) -> Iterator[tuple[torch.device, torch.dtype, list[int]]]:
    """Yield the devices and dtypes of which the backend serves some eager message, with sizes in elements."""
    for route in backend.decision.routes:
        if (route.op, route.mode) == ("all_reduce", "eager"):
            dtype = getattr(torch, route.dtype)
            sizes = sizes_of(route.rules, name, dtype.itemsize, most_nbytes, least_nbytes)
            if sizes:
                yield device_of(backend, route), dtype, sizes


def device_of(backend: comm.Backend, route: Route) -> torch.device:
    """Return this rank's device for the messages of a route."""
    return backend.device if route.device_type == backend.device.type else torch.device(route.device_type)


@contextlib.contextmanager
def open_handle(name: str, group: dist.ProcessGroup | None = None, wire: str | None = None) -> Iterator[comm.Backend]:
    """Get a handle that the backend serves, prepared if it serves nothing before that; check it, and close it."""
    backend = comm.get_backend(group, backends=(name,), wire=wire)
    prepare_if_needed(backend, name)
    yield backend
    synchronize(backend)
    backend.check()
    comm.close(group)


@contextlib.contextmanager
def warnings_of_core() -> Iterator[list[str]]:
    """Yield a list that gains the warnings that core logs, such as of a hook `close` that raised or hung."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("comm_core")
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def synchronize(backend: comm.Backend) -> None:
    """Wait for the group's GPU, if it has one."""
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)


def fused_cells(backend: comm.Backend, name: str, mode: str = "eager") -> Iterator[tuple[Route, tuple[int, int]]]:
    """Yield shapes of the fused operation, in tokens and elements, that the backend serves, with their routes."""
    for route in backend.decision.routes:
        if (route.op, route.mode) == (FUSED, mode):
            itemsize = getattr(torch, route.dtype).itemsize
            edges = {rule.max_tokens for rule in route.rules if rule.max_tokens}
            multiples = {rule.hidden_multiple * factor for rule in route.rules for factor in (1, 3, 5)}
            shapes = itertools.product(sorted({*_TOKENS, *edges}), sorted({*_HIDDEN, *multiples}))
            found = [
                (tokens, hidden)
                for tokens, hidden in shapes
                if tokens * hidden * itemsize <= inputs.SMALL_NBYTES
                and route.backend_for(tokens * hidden * itemsize, tokens, hidden) == name
            ]
            yield from ((route, shape) for shape in found[:: max(1, len(found) // 24)])


def first_call(name: str, backend: comm.Backend) -> SumCall | FusedCall:
    """Return an eager call that the backend serves: a sum, or else the fused operation."""
    for device, dtype, sizes in eager_cells(backend, name, 1 << 16):
        return SumCall(backend, device, dtype, sizes[-1])
    for route, shape in fused_cells(backend, name):
        return FusedCall(backend, getattr(torch, route.dtype), shape)
    raise AssertionError("the backend serves no eager call")


def graph_calls(backend: comm.Backend, name: str) -> Iterator[SumCall | FusedCall]:
    """Yield calls of several sizes of each dtype that the backend serves in graphs."""
    for route in backend.decision.routes:
        if (route.op, route.mode, route.device_type) == ("all_reduce", "graph", "cuda"):
            dtype = getattr(torch, route.dtype)
            sizes = sizes_of(route.rules, name, dtype.itemsize)
            for numel in sizes[:: max(1, len(sizes) // 3)]:
                yield SumCall(backend, backend.device, dtype, numel)
    for route, shape in itertools.islice(fused_cells(backend, name, "graph"), 0, None, 8):
        yield FusedCall(backend, getattr(torch, route.dtype), shape)


def call_and_check(name: str, backend: comm.Backend) -> None:
    """Make a call three times, and check: a kernel's error shows in `check`, or in the next call."""
    call = first_call(name, backend)
    for _ in range(3):
        call()
        synchronize(backend)
        backend.check()


def check_sum(
    backend: comm.Backend,
    device: torch.device,
    dtype: torch.dtype,
    numel: int,
    what: str,
    members: Sequence[int] | None = None,
    salt: int = 0,
) -> None:
    """Sum integers over the ranks of a group, by default all, and check every element."""
    call = SumCall(backend, device, dtype, numel, members, salt)
    call.check_results(call(), what)


class SumCall:
    """A sum of integers, which is exact.

    Attributes:
        hook: the backend's hook for it.
        dtype: of the message.

    Args:
        backend: the handle.
        device: of the message.
        dtype: of the message.
        numel: the number of elements.
        members: the group's ranks; None: all.
        salt: changes the inputs.
    """

    hook = "all_reduce"

    def __init__(
        self,
        backend: comm.Backend,
        device: torch.device,
        dtype: torch.dtype,
        numel: int,
        members: Sequence[int] | None = None,
        salt: int = 0,
    ) -> None:
        self._backend = backend
        self._members = range(dist.get_world_size()) if members is None else members
        self.dtype, self._tensor = dtype, torch.empty(numel, device=device, dtype=dtype)
        self.fill(salt)

    def fill(self, salt: int) -> None:
        """Write other inputs into the message, and note their sum."""
        x = self._tensor
        every = [make_integers(rank, dist.get_world_size(), x.numel(), x.dtype, salt) for rank in self._members]
        x.copy_(every[self._members.index(dist.get_rank())])
        self._total = sum_exactly(every).to(x.dtype)

    def __call__(self) -> torch.Tensor:
        """Return the sum."""
        return self._backend.all_reduce(self._tensor)

    def check_results(self, result: Any, what: str) -> None:
        """Compare what a call returned with the sum."""
        x = self._tensor
        assert torch.equal(result.cpu(), self._total), f"{what}: wrong sums of {x.numel()} elements of {x.dtype}"


class FusedCall:
    """A call of the fused operation on integers, whose sums are exact.

    Attributes:
        hook: the backend's hook for it.
        dtype: of all its tensors.

    Args:
        backend: the handle.
        dtype: of all tensors.
        shape: of the message: [num_tokens, hidden_size].
    """

    hook = FUSED

    def __init__(self, backend: comm.Backend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        self.dtype, self._backend, self._shape = dtype, backend, shape
        # This rank's message, the residual, and the weight.
        self._operands = [torch.empty(s, dtype=dtype, device=backend.device) for s in (shape, shape, shape[1:])]
        self.fill(0)

    def fill(self, salt: int) -> None:
        """Write other inputs into the operands, and note what comes of them."""
        world_size, shape = dist.get_world_size(), self._shape
        *every, residual = [  # the last "rank" is the residual
            make_integers(rank, world_size + 1, shape[0] * shape[1], self.dtype, salt).view(shape)
            for rank in range(world_size + 1)
        ]
        weight = (torch.arange(shape[1]) % 3 + 1).to(self.dtype)
        self._inputs = [every[dist.get_rank()], residual, weight]
        for operand, value in zip(self._operands, self._inputs, strict=True):
            operand.copy_(value)
        total = sum_exactly([*every, residual])
        self._total = total.to(self.dtype)
        self._normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + _EPS) * (weight.double() + 1)

    def __call__(self, **outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm and the sum with the residual."""
        x, residual, weight = self._operands
        return self._backend.all_reduce_add_rms_norm(x, residual, weight, _EPS, 1.0, **outputs)

    def check_results(self, results: Any, what: str) -> None:
        """Compare what a call returned with what the operands give."""
        normed, summed = results
        what = f"{what}: the fused operation of {list(normed.shape)} of {normed.dtype}"
        assert torch.equal(summed.cpu(), self._total), f"{what}: the sum with the residual is wrong"
        # Two roundings to the dtype, or the error of float32.
        tolerance = max(4 * torch.finfo(normed.dtype).eps, 1e-5)
        near = torch.allclose(normed.cpu().double(), self._normed, rtol=tolerance, atol=tolerance)
        assert near, f"{what}: the norm is wrong"

    def check_outputs(self) -> None:
        """Call without outputs, which keeps the operands, and in place."""
        self.check_results(self(), "without outputs")
        for operand, value in zip(self._operands, self._inputs, strict=True):
            assert torch.equal(operand.cpu(), value), f"a fused call of {list(value.shape)} changed an input"
        x, residual, weight = self._operands
        results = self(out=x, residual_out=residual)
        self.check_results(results, "in place")
        assert results[0] is x, "`out` isn't returned"
        assert results[1] is residual, "`residual_out` isn't returned"
        assert torch.equal(weight.cpu(), self._inputs[2]), "a fused call changed the weight"
