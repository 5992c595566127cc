"""All-reduce by kernels of our own over CUDA IPC: for GPUs of one host with peer access, NVLink or not.

What each algorithm does is told at the top of its file in `csrc/`, and which serves which size in `policy.py`. Sums are
in rank order, in float32, rounded once: every rank holds the same bits, and a rerun gives them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comm_core as comm
from comm_core import eligibility, kernels

from comm_plugin_customar_v1 import policy, session
from comm_plugin_customar_v1.session import Session

if TYPE_CHECKING:
    import torch

__all__ = ["COMM_HOOK_API", "all_reduce", "check", "close", "connect", "is_available", "probe"]

COMM_HOOK_API = (1, 0)

DTYPES = ("float32", "float16", "bfloat16")
#: The oldest compute capability that there are kernels for.
OLDEST = (8, 0)

_NAME = "customar_v1"
_library = kernels.Library("comm_plugin_customar_v1")


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
    """Peer access between every two of the group's devices, which are on one host; beyond two also NVLink."""
    reason = (
        eligibility.no_cuda(topology)
        or _unfit_size(topology)
        or eligibility.no_native_code(topology, _NAME)
        or _unfit_option(topology)
        or eligibility.unfit_devices(topology, OLDEST)
        or _unfit_links(topology)
    )
    if reason:
        return comm.Unavailable(reason)
    # Any number of elements: the kernels touch nothing behind the last one, not even to read it.
    served = comm.Range("all_reduce", dtypes=DTYPES, device_types=("cuda",), max_nbytes=policy.MAX_NBYTES)
    return comm.Available(200, (served,))


def _unfit_size(topology: comm.Topology) -> str:
    if topology.world_size in policy.WORLD_SIZES:
        return ""
    sizes = ", ".join(map(str, policy.WORLD_SIZES[:-1]))
    return f"it takes {sizes} or {policy.WORLD_SIZES[-1]} ranks, and the group has {topology.world_size}"


def _unfit_option(topology: comm.Topology) -> str:
    forced = [info.facts[_NAME]["forced"] for info in topology.ranks]
    differing = [rank for rank, value in enumerate(forced) if value != forced[0]]
    if differing:
        return f"{policy.OPTION} differs between ranks 0 and {differing[0]}"
    row, most = _forced(topology), policy.most_vecs(topology.world_size)
    if row is not None and row.vecs > most:
        return (
            f"{policy.OPTION} asks for vecs={row.vecs}, and with {topology.world_size} ranks there are {most} at most"
        )
    return ""


def _unfit_links(topology: comm.Topology) -> str:
    if not topology.one_host:
        hosts = len({info.host.id for info in topology.ranks})
        return f"its ranks are on {hosts} hosts, or in containers apart, and CUDA IPC ends there"
    for rank in range(topology.world_size):
        for peer in range(rank):
            link = topology.link(peer, rank)
            if not link.p2p:
                return f"ranks {peer} and {rank} have no peer access: {link.reason or 'the driver gives none'}"
            # Over PCIe all pairs share the way, on which this design sends W - 1 messages a rank; vLLM and SGLang leave
            # more than two ranks there to NCCL, too.
            if topology.world_size > 2 and not link.nvlinks:
                why = link.reason or "none was found"
                return f"ranks {peer} and {rank} have no NVLink between them, which more than two ranks need: {why}"
    return ""


def _forced(topology: comm.Topology) -> policy.Row | None:
    numbers = topology.ranks[0].facts[_NAME]["forced"]
    if numbers is None:
        return None
    names = {code: name for name, code in policy.ALGORITHMS.items()}
    return policy.Row(numbers[0], names[numbers[1]], *numbers[2:])


@comm.hookimpl
def connect(topology: comm.Topology, context: comm.GroupContext) -> Session:
    """Build, allocate and open; see `session.connect`."""
    return session.connect(_library.load(), _forced(topology), context)


@comm.hookimpl
def all_reduce(session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Sum over the ranks; see the hook's spec."""
    try:
        if out is None:
            return session.fresh(tensor)  # type: ignore[no-any-return]
        session.into(tensor, out)
    except RuntimeError:
        session.check()  # a kernel gave up: that is what is to be told
        raise
    return out


@comm.hookimpl
def check(session: Session) -> None:
    """Raise where a kernel gave up waiting."""
    session.check()


@comm.hookimpl
def close(session: Session, orderly: bool) -> None:
    """Give the buffer back."""
    session.close(orderly)
