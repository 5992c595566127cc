"""All-reduce, residual and RMSNorm in one of FlashInfer's kernels, for GPUs of one host that NVLink joins.

FlashInfer is imported in `connect`, and its workspace made in `pre_capture_init`: until then nothing is served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comm_core as comm
from comm_core import eligibility

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
    """Whether FlashInfer is there, and which."""
    return {"missing": library.missing(), "version": library.installed()}


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """NVLink between every two of the group's devices, which are on one host, distinct, and Hopper's or Blackwell's."""
    reason = _reason(topology)
    if reason:
        return comm.Unavailable(reason)
    served = comm.Range(
        "all_reduce_add_rms_norm",
        dtypes=policy.DTYPES,
        device_types=("cuda",),
        max_nbytes=policy.MOST_NBYTES[topology.world_size],
        multiple_nbytes=16,
        hidden_multiple=8,
        prepared=True,
    )
    return comm.Available(200, (served,))


def _reason(topology: comm.Topology) -> str:
    """Why the group can't be served; "" where it can."""
    reason = _unfit_facts(topology)
    if reason:
        return reason
    if "cuda" not in topology.device_types:
        return "it takes CUDA tensors, and this group has none"
    if topology.world_size not in policy.MOST_NBYTES:
        return f"it takes 2, 4 or 8 ranks, and the group has {topology.world_size}"
    if not topology.one_host:
        return "its ranks are on several hosts, or in containers apart"
    return _unfit_devices(topology)


def _unfit_facts(topology: comm.Topology) -> str:
    versions = []
    for rank, info in enumerate(topology.ranks):
        facts = info.facts.get("flashinfer_fusion")
        if facts is None:
            return f"rank {rank} didn't report whether it has flashinfer"
        if facts["missing"]:
            return f"on rank {rank} {facts['missing']}"
        versions.append(facts["version"])
    differing = next((rank for rank, version in enumerate(versions) if version != versions[0]), None)
    return (
        "" if differing is None else f"ranks 0 and {differing} have FlashInfer {versions[0]} and {versions[differing]}"
    )


def _unfit_devices(topology: comm.Topology) -> str:
    devices = [info.device for info in topology.ranks if info.device is not None and info.device.type == "cuda"]
    if len(devices) < topology.world_size:
        return "not every rank has a CUDA device"
    capabilities = {device.capability for device in devices}
    if len(capabilities) > 1 or devices[0].capability[0] not in (9, 10):
        listed = ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
        return f"it takes devices of one compute capability, 9.x or 10.x, and these have {listed}"
    shared = eligibility.shared_device(topology)
    if shared:
        return shared
    for rank in range(topology.world_size):
        for peer in range(rank):
            link = topology.link(peer, rank)
            if not link.nvlinks or not link.p2p:
                lacking = "peer access" if link.nvlinks else "NVLink"
                return f"ranks {peer} and {rank} have no {lacking} between them: {link.reason or 'none was found'}"
    return ""


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Import FlashInfer and build its kernels; nothing is allocated yet."""
    return Session(library.load(), context)


@comm.hookimpl
def pre_capture_init(session: Session, shapes: comm.Shapes) -> list[comm.Range] | None:
    """Make the workspace for these shapes; see `Session.prepare`."""
    return session.prepare(shapes)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The plain sum; see the hook's spec."""
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
    """The fused operation; see the hook's spec."""
    return session.fused(tensor, residual, weight, eps, weight_offset, out, residual_out)


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Give the workspaces back."""
    session.close(orderly)
