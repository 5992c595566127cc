"""All-reduce by kernels of our own, for GPUs that NVLink joins.

What each algorithm does is told at the top of its file in `csrc/`, and which serves which size in `policy.py`. Sums are
in rank order, in float32, rounded once: every rank holds the same bits, and a rerun gives them again.
"""

from __future__ import annotations

from typing import Any

import comm_core as comm
import torch
from comm_core import kernels

from comm_plugin_customar_v2 import norm_policy, policy, session
from comm_plugin_customar_v2.session import Session

__all__ = [
    "COMM_HOOK_API",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "check",
    "close",
    "connect",
    "is_available",
    "probe",
]

COMM_HOOK_API = (1, 0)

DTYPES = ("float32", "float16", "bfloat16")
#: `kVecNbytes` in comm_core/vec.cuh.
VEC_NBYTES = 16

_library = kernels.Library("comm_plugin_customar_v2")


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Whether the native code can be had here, and what the option says."""
    try:
        forced, wrong = policy.parse(), None
    except ValueError as error:
        forced, wrong = None, str(error)[:300]  # facts are small, and what it quotes may be any text
    return {"missing": _library.missing() or wrong, "forced": forced and list(forced.numbers())}


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """NVLink between every two of the group's devices, which are two to eight, distinct, and of one generation."""
    reason = policy.unavailable_reason(topology)
    if reason:
        return comm.Unavailable(reason)
    kind = _major(topology), topology.world_size
    rows = policy.rows_for(*kind, _forced(topology))
    # Any number of elements: the kernels touch nothing behind the last one, not even to read it.
    served = comm.Range("all_reduce", dtypes=DTYPES, device_types=("cuda",), max_nbytes=rows[-1].up_to_nbytes)
    fused = _fused(norm_policy.rows_for(*kind)[-1].up_to_nbytes)
    return comm.Available(300, (served, *fused), checks_operands=True)


def _fused(max_nbytes: int) -> tuple[comm.Range, ...]:
    """Rows of whole vectors, so that none begins within one."""
    return tuple(
        comm.Range(
            "all_reduce_add_rms_norm",
            dtypes=dtypes,
            device_types=("cuda",),
            max_nbytes=max_nbytes,
            hidden_multiple=VEC_NBYTES // itemsize,
        )
        for dtypes, itemsize in ((DTYPES[:1], 4), (DTYPES[1:], 2))
    )


def _major(topology: comm.Topology) -> int:
    device = topology.ranks[0].device
    return 0 if device is None else device.capability[0]


def _forced(topology: comm.Topology) -> policy.Row | None:
    numbers = topology.ranks[0].facts["customar_v2"]["forced"]
    if numbers is None:
        return None
    names = {code: name for name, code in policy.ALGORITHMS.items()}
    return policy.Row(numbers[0], names[numbers[1]], *numbers[2:])


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Build, allocate and map; see `session.connect`."""
    return session.connect(_library.load(), _major(topology), _forced(topology), context)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    try:
        if out is None:
            return session.all_reduce(tensor)  # type: ignore[no-any-return]
        session.all_reduce_out(tensor, out)
    except RuntimeError:
        session.check()  # a kernel gave up: that is what is to be told
        raise
    return out


@comm.hookimpl
def all_reduce_add_rms_norm(
    session: Session,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the ranks, add the residual, normalise; see the hook's spec.

    Normalises the sum as it is returned, rounded: a row's bits are the same on every rank, alone or among others. The
    native code checks the operands.
    """
    if weight.requires_grad:
        weight = weight.detach()  # a parameter is one even where gradients are off, and some bindings refuse it
    if out is None:
        out = torch.empty_like(tensor)
    if residual_out is None:
        residual_out = torch.empty_like(residual)
    try:
        taken = session.all_reduce_add_rms_norm_out(tensor, residual, weight, out, residual_out, eps, weight_offset)
    except RuntimeError:
        session.check()  # as above
        raise
    return (out, residual_out) if taken else NotImplemented


@comm.hookimpl
def check(session: Session) -> None:
    """Raise where a kernel gave up waiting."""
    session.check()


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Give the buffer back."""
    session.close(orderly)
