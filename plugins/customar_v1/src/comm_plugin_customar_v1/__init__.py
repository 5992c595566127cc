"""All-reduce by CUDA kernels that read their peers' memory, for GPUs of one host, with or without NVLink.

Each algorithm is described at the top of its file in `csrc/`; `policy.py` chooses one by size. Sums are in rank order,
in float32, rounded once: every rank holds the same bits, and a rerun gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comm_core as comm
from comm_core import kernels, memory, types

from comm_plugin_customar_v1 import policy, session
from comm_plugin_customar_v1.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from comm_core.tuning import VariantChoice

__all__ = [
    "COMM_HOOK_API",
    "abort",
    "all_reduce",
    "check",
    "close",
    "connect",
    "is_available",
    "probe",
    "resume",
    "suspend",
    "use_variants",
    "variants",
    "waits",
]

COMM_HOOK_API = (1, 0)

_library = kernels.Library("comm_plugin_customar_v1")


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Report why the native code can't be used here, and the row that the option forces."""
    try:
        forced, wrong = policy.parse(), None
    except ValueError as error:
        forced, wrong = None, str(error)[:300]  # facts are small, and the quoted option may have any length
    return {"missing": _library.missing() or memory.missing() or wrong, "forced": forced and list(forced.numbers())}


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """Require one host and peer access between every two devices; with more than two ranks also NVLink."""
    reason = policy.unavailable_reason(topology)
    if reason:
        return comm.Unavailable(reason)
    return comm.Available(policy.PRIORITY, policy.ranges(topology), numerics=types.RANK_ORDER_FP32)


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Build, allocate and share buffers, and test peer access; see `session.connect`."""
    return session.connect(_library.load(), policy.forced_row(topology), context)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    try:
        if out is None:
            return session.all_reduce(tensor)  # type: ignore[no-any-return]
        session.all_reduce_out(tensor, out)
    except RuntimeError:
        session.check()  # if a kernel timed out, raise that
        raise
    return out


@comm.hookimpl
def waits(session: Session) -> dict[int, tuple[int, float, float]]:
    """Return this rank's long waits for each peer; see `Session.waits`."""
    return session.waits()


@comm.hookimpl
def variants(session: Session, op: str, nbytes: int, num_tokens: int) -> list[str]:
    """Return the launch shapes that can serve a message, in the form of the option."""
    return session.variants(nbytes) if op == "all_reduce" else []


@comm.hookimpl
def use_variants(session: Session, choices: Sequence[VariantChoice]) -> None:
    """Serve by these launch shapes."""
    session.use_variants(choices)


@comm.hookimpl
def check(session: Session) -> None:
    """Raise if a kernel timed out waiting for a peer."""
    session.check()


@comm.hookimpl
def suspend(session: Session) -> None:
    """Give the buffers' memory back."""
    session.suspend()


@comm.hookimpl
def resume(session: Session) -> None:
    """Take memory for the buffers again, at the same addresses."""
    session.resume()


@comm.hookimpl
def abort(session: Session) -> None:
    """End the waits of this rank's kernels."""
    session.abort()


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Free the buffers, or keep them until the process ends if kernels may still use them."""
    session.close(orderly)
