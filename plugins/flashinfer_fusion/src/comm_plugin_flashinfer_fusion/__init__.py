"""All-reduce, residual and RMSNorm in one kernel of FlashInfer, for GPUs of one host with NVLink.

`connect` imports FlashInfer, and `pre_capture_init` creates its workspace; before that nothing is served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comm_core as comm

from comm_plugin_flashinfer_fusion import library, policy
from comm_plugin_flashinfer_fusion.session import Session

if TYPE_CHECKING:
    import torch

__all__ = [
    "COMM_HOOK_API",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "close",
    "connect",
    "is_available",
    "pre_capture_init",
    "probe",
]

COMM_HOOK_API = (1, 0)


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Report why FlashInfer can't be used here, and its version."""
    return {"missing": library.missing(), "version": library.installed_version()}


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """Require one host, and NVLink between every two devices, which are distinct and of Hopper or Blackwell."""
    reason = policy.unavailable_reason(topology)
    return comm.Unavailable(reason) if reason else comm.Available(policy.PRIORITY, policy.ranges(topology))


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Import FlashInfer and build its kernels; allocate nothing yet."""
    return Session(library.load(), context)


@comm.hookimpl
def pre_capture_init(session: Session, shapes: comm.Shapes) -> list[comm.Range] | None:
    """Create the workspace for these shapes; see `Session.prepare`."""
    return session.prepare(shapes)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    return session.all_reduce(tensor, out)


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
    """Sum over the ranks, add the residual and normalise; see the hook's spec."""
    return session.all_reduce_add_rms_norm(tensor, residual, weight, eps, weight_offset, out, residual_out)


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Free the workspaces."""
    session.close(orderly)
