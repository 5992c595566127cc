"""All-reduce by CUDA kernels that push over NVLink, alone or with residual and RMSNorm in one call.

Each algorithm is described at the top of its file in `csrc/`; `policy.py` and `norm_policy.py` choose one by size. Sums
are in rank order, in float32, rounded once, but for those over an FP8 wire (`csrc/twoshot_push_fp8.cuh`). Every rank
holds the same bits, and a rerun gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comm_core as comm
import torch
from comm_core import kernels, memory
from comm_core.types import QUANTS, RANK_ORDER_FP32

from comm_plugin_customar_v2 import policy, session
from comm_plugin_customar_v2.session import PaddedSession, Session

if TYPE_CHECKING:
    from comm_core.tuning import VariantChoice

__all__ = [
    "COMM_HOOK_API",
    "abort",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_quant",
    "check",
    "close",
    "connect",
    "is_available",
    "padded_session",
    "probe",
    "resume",
    "suspend",
    "use_variants",
    "variants",
    "waits",
]

COMM_HOOK_API = (1, 0)

# `QuantForm` in csrc/quant.cuh.
_FORMS = {form: code for code, form in enumerate(QUANTS)}
_library = kernels.Library("comm_plugin_customar_v2")


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
    """Require NVLink and peer access between every two devices, on one host or in one NVLink clique."""
    reason = policy.unavailable_reason(topology)
    if reason:
        return comm.Unavailable(reason)
    ranges = policy.ranges(topology)
    return comm.Available(policy.PRIORITY, ranges, checks_operands=True, numerics=RANK_ORDER_FP32)


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Build, allocate and map buffers; see `session.connect`."""
    return session.connect(_library.load(), topology, context)


@comm.hookimpl
def padded_session(session: Session, num_tokens: torch.Tensor) -> Any:
    """Return the object that takes the session's place on padded batches, in groups of 2, 4 and 8 ranks."""
    return session.padded(num_tokens) or NotImplemented


@comm.hookimpl
def all_reduce(session: Session | PaddedSession, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
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
def all_reduce_add_rms_norm(
    session: Session | PaddedSession,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the ranks, add the residual, normalise; see the hook's spec.

    Normalises the rounded sum that it returns, so a row's bits are the same on every rank and don't depend on the
    other rows. The native code checks the operands.
    """
    if weight.requires_grad:
        weight = weight.detach()  # `no_grad` leaves a parameter's flag set, and some bindings refuse such a tensor
    if out is None:
        out = torch.empty_like(tensor)
    if residual_out is None:
        residual_out = torch.empty_like(residual)
    try:
        taken = session.all_reduce_add_rms_norm_out(tensor, residual, weight, out, residual_out, eps, weight_offset)
    except RuntimeError:
        session.check()  # if a kernel timed out, raise that
        raise
    return (out, residual_out) if taken else NotImplemented


@comm.hookimpl
def all_reduce_add_rms_norm_quant(
    session: Session | PaddedSession,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    quant: str,
    scale: torch.Tensor,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    norm_out: torch.Tensor | None,
) -> Any:
    """Sum over the ranks, add the residual, normalise, quantise; see the hook's spec. Declines long rows."""
    norm = residual_out if norm_out is None else norm_out  # not written in the former case
    try:
        taken = session.all_reduce_add_rms_norm_quant(
            *(tensor, residual, weight, out.view(torch.uint8), scale, residual_out, norm, norm_out is not None),
            *(eps, weight_offset, _FORMS[quant]),
        )
    except RuntimeError:
        session.check()  # if a kernel timed out, raise that
        raise
    return None if taken else NotImplemented


@comm.hookimpl
def waits(session: Session) -> dict[int, tuple[int, float, float]]:
    """Return this rank's long waits for each peer; see `Session.waits`."""
    return session.waits()


@comm.hookimpl
def variants(session: Session, op: str, nbytes: int, num_tokens: int) -> list[str]:
    """Return the launch shapes that can serve a message, in the form of the option."""
    return session.variants(op, nbytes, num_tokens)


@comm.hookimpl
def use_variants(session: Session, choices: Sequence[VariantChoice]) -> None:
    """Serve by these launch shapes. Those of the fused call hold for its form with FP8 out, too."""
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
    """Free the buffer, or keep it until the process ends if kernels may still use it."""
    session.close(orderly)
