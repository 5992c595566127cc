"""All-reduce by NCCL, the library that torch has loaded, called without torch.distributed around it.

A call is one `ncclAllReduce` on the current stream: no event, no copy, no work object. NCCL orders the calls of one
communicator itself, also on several streams.
"""

from __future__ import annotations

from typing import Any

import comm_core as comm
import torch

from comm_plugin_nccl import library, policy, session
from comm_plugin_nccl.policy import DTYPE_CODES
from comm_plugin_nccl.session import SUM, Session

__all__ = [
    "COMM_HOOK_API",
    "abort",
    "all_reduce",
    "check",
    "close",
    "connect",
    "is_available",
    "pre_capture_init",
    "probe",
]

COMM_HOOK_API = (1, 0)

# Facts are small: the most characters of a text among them.
_FACT_CHARS = 200


@comm.hookimpl
def probe() -> dict[str, Any]:
    """Report which NCCL this process has, or why it can't be called."""
    try:
        binding = library.load()
    except ImportError as error:
        return {"missing": str(error)[:_FACT_CHARS], "nccl": None, "library": None}
    return {
        "missing": library.unfit_environment() or None,
        "nccl": library.version(binding),
        "library": str(binding.get_library_path())[-_FACT_CHARS:],
    }


@comm.hookimpl
def is_available(topology: comm.Topology) -> comm.Available | comm.Unavailable:
    """Require a CUDA device for each rank and one version of NCCL, on any number of hosts."""
    reason = policy.unavailable_reason(topology)
    return comm.Unavailable(reason) if reason else comm.Available(policy.PRIORITY, policy.ranges(topology))


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Create the group's communicator; see `session.connect`."""
    return session.connect(library.load(), library.current_stream_function(), topology, context)


@comm.hookimpl
def pre_capture_init(session: Session, shapes: comm.Shapes) -> None:
    """Call once at each power of two up to `shapes`: NCCL connects what a size needs at the first call of that size."""
    numels = policy.warm_up_numels(shapes)
    # Raises if the hook failed on another rank, for which NCCL's kernels would wait.
    session.control.barrier()
    if numels:
        tensor = torch.zeros(numels[-1], dtype=shapes.dtype, device=session.device)
        for numel in numels:
            all_reduce(session, tensor[:numel], tensor[:numel])
        session.synchronize()


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
            DTYPE_CODES[tensor.dtype],
            SUM,
            session.communicator,
            session.current_stream(session.device_index),
        )
    except session.binding_error as error:
        session.raise_failure(error)
    return out


@comm.hookimpl
def check(session: Session) -> None:
    """Raise an error that NCCL noticed, or that a peer's process has ended."""
    session.check()


@comm.hookimpl
def abort(session: Session) -> None:
    """End the waits of this rank's kernels."""
    session.abort()


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Destroy the communicator, or abort it after a failure."""
    session.close(orderly)
