"""All-reduce by NCCL, the library that torch has loaded, without torch.distributed around it.

A call is one of `ncclAllReduce` on the current stream: no event, no copy, no work object. NCCL orders the calls of one
communicator by itself, whatever streams they are on.
"""

from __future__ import annotations

import math
from typing import Any

import comm_core as comm
import torch
from comm_core import eligibility

from comm_plugin_nccl import library, session
from comm_plugin_nccl.session import CODES, SUM, Session

__all__ = ["COMM_HOOK_API", "all_reduce", "check", "close", "connect", "is_available", "pre_capture_init", "probe"]

COMM_HOOK_API = (1, 0)

#: What `pre_capture_init` warms up at most, in bytes: as much as core's admission test takes of a bounded range.
WARM_NBYTES = 64 << 20
# Facts are small: of a text, so many characters.
_FACT_CHARS = 200


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Which NCCL this process has, or why it can't be called."""
    try:
        binding = library.load()
    except ImportError as error:
        return {"missing": str(error)[:_FACT_CHARS]}
    return {
        "missing": library.refused() or None,
        "nccl": library.version(binding),
        "library": str(binding.get_library_path())[-_FACT_CHARS:],
    }


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """A CUDA device of its own for each rank, and one version of NCCL. On any number of hosts."""
    reason = _reason(topology)
    if reason:
        return comm.Unavailable(reason)
    dtypes = tuple(str(dtype) for dtype in CODES)
    return comm.Available(100, (comm.Range("all_reduce", dtypes=dtypes, device_types=("cuda",)),))


def _reason(topology: comm.Topology) -> str:
    """Why the group can't be served; "" where it can."""
    if "cuda" not in topology.device_types:
        return "it sums CUDA tensors, and this group has none"
    if topology.world_size < 2:
        return "it takes two ranks or more"
    return _unfit_devices(topology) or _unfit_facts(topology)


def _unfit_devices(topology: comm.Topology) -> str:
    for rank, info in enumerate(topology.ranks):
        if info.device is None or info.device.type != "cuda":
            return f"rank {rank} has no CUDA device"
    return eligibility.shared_device(topology)


def _unfit_facts(topology: comm.Topology) -> str:
    versions: dict[str, int] = {}
    for rank, info in enumerate(topology.ranks):
        facts = info.facts.get("nccl")
        if facts is None:
            return f"rank {rank} didn't report whether it has NCCL"
        if facts["missing"]:
            return f"on rank {rank} {facts['missing']}"
        versions.setdefault(facts["nccl"], rank)
    if len(versions) == 1:
        return ""
    # Not only across majors: NCCL itself refuses a group of unequal versions.
    listed = ", ".join(f"{version} on rank {rank}" for version, rank in versions.items())
    return f"its ranks have different versions of NCCL: {listed}"


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Make the group's communicator; see `session.connect`."""
    return session.connect(library.load(), library.raw_stream(), topology, context)


@comm.hookimpl
def pre_capture_init(session: Session, shapes: comm.Shapes) -> None:
    """Call once at each power of two up to `shapes`: NCCL connects what a size needs when it first meets it."""
    if shapes.dtype not in CODES:
        return
    numel = min(shapes.max_tokens * shapes.hidden_size, WARM_NBYTES // shapes.dtype.itemsize)
    tensor = torch.zeros(numel, dtype=shapes.dtype, device=session.device)
    for exponent in range(math.ceil(math.log2(numel)) + 1):
        part = tensor[: min(1 << exponent, numel)]
        all_reduce(session, part, part)
    if session.device.type == "cuda":
        torch.cuda.current_stream(session.device).synchronize()


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    address = tensor.data_ptr()
    if out is None:
        out = torch.empty_like(tensor)
    try:
        session.launch(
            address,
            address if out is tensor else out.data_ptr(),
            tensor.numel(),
            CODES[tensor.dtype],
            SUM,
            session.communicator,
            session.stream_of(session.index),
        )
    except session.refusal as error:
        session.failed(error)
    return out


@comm.hookimpl
def check(session: Session) -> None:
    """Raise what NCCL noticed, or that a peer has ended."""
    session.check()


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Give the communicator back."""
    session.close(orderly)
