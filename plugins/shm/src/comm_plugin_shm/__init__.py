"""All-reduce over shared memory, for CPU tensors of ranks on one host.

`csrc/protocol.h` describes the protocol and why it needs no barrier. Sums are in rank order, bfloat16 and float16 in
float32 and rounded once: every rank holds the same bits, and a rerun gives the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comm_core as comm
import torch
from comm_core import kernels, types

from comm_plugin_shm import policy, session
from comm_plugin_shm.policy import DTYPE_CODES
from comm_plugin_shm.session import Session

__all__ = ["COMM_HOOK_API", "abort", "all_reduce", "close", "connect", "is_available", "limits", "probe", "waits"]

COMM_HOOK_API = (1, 0)

_library = kernels.Library("comm_plugin_shm")


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Report why the native code can't be used here, and in which PID namespace this process runs."""
    return {"missing": _library.missing(), "pid_namespace": str(Path("/proc/self/ns/pid").readlink())}


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """Require CPU tensors, one host, one PID namespace and 2 to 64 ranks."""
    reason = policy.unavailable_reason(topology)
    if reason:
        return comm.Unavailable(reason)
    return comm.Available(policy.PRIORITY, policy.ranges(topology), numerics=types.RANK_ORDER_FP32)


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Map the memory that the ranks share; see `session.connect`."""
    return session.connect(_library.load(), context)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    if out is None:
        out = torch.empty_like(tensor)
    numel = tensor.numel()
    result = session.all_reduce(tensor.data_ptr(), out.data_ptr(), numel, DTYPE_CODES[tensor.dtype])
    if result:
        session.raise_failure(result, numel, tensor.dtype)
    return out


@comm.hookimpl
def limits(session: Session) -> dict[str, float]:
    """Measure what bounds this backend on this machine; see `Session.limits`."""
    return session.limits()


@comm.hookimpl
def waits(session: Session) -> dict[int, tuple[int, float, float]]:
    """Return this rank's waits for each peer; see `Session.waits`."""
    return session.waits()


@comm.hookimpl
def abort(session: Session) -> None:
    """Let the peers' waits for this rank end."""
    session.abort()


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Unmap the shared memory, which is freed once no rank maps it."""
    session.close(orderly)
