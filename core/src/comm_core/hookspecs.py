"""The hooks of a backend plugin. This file is the contract; `docs/writing-a-plugin.md` is the way in.

A plugin is a module, or an object, that the entry-point group `comm_core.backends` names. It sets
`COMM_HOOK_API = (1, 0)` and marks its hooks with `@comm_core.hookimpl`. Only `all_reduce` is required.

An implementation has exactly its spec's parameters, in its order, without defaults: the hot path is bound once a group
and called by position. *Local* hooks talk to no other rank. *Collective* hooks run on every rank of the group at once,
under a deadline, and may talk through `context.control`; core votes on how they ended.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from comm_core.context import GroupContext, Shapes
    from comm_core.topology import Topology
    from comm_core.types import Available, Range, Unavailable

__all__ = ["API", "PROJECT", "hookimpl", "hookspec"]

#: The version of these specs, (major, minor). A plugin's `COMM_HOOK_API` has this major and a minor no higher.
API = (1, 0)
#: pluggy's project name.
PROJECT = "comm_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def probe() -> dict[str, Any]:  # type: ignore[empty-body]
    """Report facts that only this plugin knows, such as a missing compiler.

    Local, optional. Called once a group, on every rank, before anything is allocated. The ranks exchange the facts;
    `is_available` finds them as `topology.ranks[i].facts[name]`.

    Returns:
        A JSON object of at most 512 bytes.

    Raises:
        Whatever it raises, and a result that is larger or isn't JSON, makes the backend unavailable for this group,
        with that as the reason.
    """


@hookspec(firstresult=True)
def is_available(topology: Topology) -> Available | Unavailable:  # type: ignore[empty-body]
    """Say whether this backend can serve the group that `topology` describes.

    Local, optional: without it the backend is available at priority 500 for all that its hooks could be asked. Called
    once a group, on every rank, before anything is allocated. Depends on `topology` alone: the ranks compare their
    answers, and where these differ the lowest priority and the intersection of the ranges count.

    Args:
        topology: what every rank reported, frozen; see `comm_core.Topology`.

    Returns:
        `Available(priority, ranges)`: a higher priority is tried first; `ranges` say which operations, dtypes, modes
        and sizes (bytes) its kernels take, and no more. `Unavailable(reason)`: one sentence without a full stop;
        `explain` prints it.

    Raises:
        Whatever it raises is read as `Unavailable`, with the exception's text as the reason.
    """


@hookspec(firstresult=True)
def connect(topology: Topology, context: GroupContext) -> Any:
    """Build, allocate and exchange all that admission needs.

    Collective, optional: without it the session is the `GroupContext`. Called at most once a group, in a thread of its
    own with the group's device and the caller's stream set. Everything that can fail on one rank alone comes before the
    first exchange. Never called while a graph is captured.

    Args:
        topology: as in `is_available`.
        context: the group, this rank's place in it, and the channel to its peers; see `comm_core.GroupContext`.

    Returns:
        The session: any object but None; it is the first argument of every later hook. Its attribute `memory_nbytes`,
        where there is one, is what it took of `context.memory_budget_nbytes`.

    Raises:
        Whatever it raises, and the deadline's end (`COMM_CORE_CONNECT_TIMEOUT_S`), makes every rank drop this backend
        for this group, for good. A `connect` that raises frees what it took itself; a session that arrives after the
        deadline is closed, not used.
    """


@hookspec(firstresult=True)
def pre_capture_init(session: Any, shapes: Shapes) -> Sequence[Range] | None:
    """Prepare everything that a capture of `shapes` would otherwise do lazily: build, allocate, exchange.

    Collective, optional. Called from `comm.pre_capture_init`, any number of times, on every rank with the same shapes;
    what is prepared only grows. Never called while a graph is captured.

    Args:
        session: what `connect` returned.
        shapes: `max_tokens` and `hidden_size` of `[num_tokens, hidden_size]`, and `dtype`.

    Returns:
        The ranges served from now on, those with `prepared=True` among them; or None where nothing changes.

    Raises:
        Whatever it raises makes every rank drop this backend for this group.
    """


@hookspec(firstresult=True)
def capture_ctx(session: Any) -> AbstractContextManager[Any]:  # type: ignore[empty-body]
    """Return the context in which this session's calls are recorded into CUDA graphs.

    Optional. Entered Local, by `comm.capture()`; left Collective. Inside it the stream may be capturing or not:
    warm-ups run at once. An exit by exception talks to nobody.

    Args:
        session: what `connect` returned.

    Returns:
        A context manager; its value is ignored, and it must not swallow exceptions.

    Raises:
        What entering raises makes those sessions that were entered before leave by exception.
    """


@hookspec(firstresult=True)
def all_reduce(session: Any, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:  # type: ignore[empty-body]
    """Sum `tensor` over the ranks of the group, elementwise. The hot path.

    Required. Called on every rank, in the same order, with tensors of one shape and dtype, on the caller's thread and
    current stream. May run while a graph is captured, where its ranges name the mode "graph".

    Args:
        session: what `connect` returned, else the `GroupContext`.
        tensor: any shape, at least one element, contiguous, aligned to 16 bytes, within the ranges.
        out: where the sum goes: a tensor of the same shape, dtype and device, contiguous, aligned to 16 bytes; `tensor`
            itself or disjoint from it. None: allocate it; `tensor` then stays as it is.

    Returns:
        `out`, or the tensor that was allocated.

    Raises:
        CommTimeoutError: a peer didn't come within `context.wait_timeout_s`; the session's later calls raise too.
        Anything else reaches the caller as a `CommError` that names the backend.
    """


@hookspec(firstresult=True)
def all_reduce_add_rms_norm(  # type: ignore[empty-body]
    session: Any,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the ranks, add the residual and normalise, in one call. Hot path.

    Optional. `s = sum over ranks of tensor + residual`; `y = s · rsqrt(mean(s², last axis) + eps) · (weight +
    weight_offset)`: RMSNorm as in Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Otherwise as
    `all_reduce`.

    Args:
        session: what `connect` returned, else the `GroupContext`.
        tensor: `[num_tokens, hidden_size]`, floating point, contiguous, aligned to 16 bytes.
        residual: like `tensor`; the same values on every rank.
        weight: `[hidden_size]`, the dtype of `tensor`; the same values on every rank.
        eps: added to the mean square.
        weight_offset: added to the weight, 1.0 for Gemma's norms.
        out: where `y` goes, like `tensor`, which it may be; None: allocate it.
        residual_out: where `s` goes, like `tensor`; it may be `residual`; None: allocate it.

    Returns:
        `(y, s)`: `out` and `residual_out`, or what was allocated.

    Raises:
        As `all_reduce`.
    """


@hookspec(firstresult=True)
def try_all_reduce_add_rms_norm(
    session: Any,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Do `all_reduce_add_rms_norm` with tensors that nobody has looked at, if they are as that hook has them. Hot path.

    Optional, beside that hook, and called before it, but not for the first call of a shape: core's own look at the
    tensors takes more than a microsecond of each call, native code's next to nothing (`comm_core/operands.h`). Tensors
    differ between ranks in where they lie: of one call, some ranks make their part by this hook and others by that one.
    All of them are a `torch.Tensor` or a `torch.nn.Parameter`; of other classes, which may wrap one, core makes the
    call.

    Args:
        session: what `connect` returned, else the `GroupContext`.
        tensor: its device's index, dtype and shape are within the ranges; nothing else is known of it, not even that it
            has memory.
        residual: not looked at.
        weight: not looked at.
        eps: added to the mean square.
        weight_offset: added to the weight.
        out: not looked at; None: allocate it.
        residual_out: not looked at; None: allocate it.

    Returns:
        `(y, s)` as there; or None, before anything is sent or written, where a tensor isn't as that hook has it. Core
        then refuses the call, or makes it by that hook, with copies.

    Raises:
        As there. Where core finds a fault in the arguments after that, it tells this one instead.
    """


@hookspec(firstresult=True)
def check(session: Any) -> None:
    """Raise what the device noted since the last call, such as a wait that ended without its peer.

    Local, optional. Called from `backend.check()`; may synchronise with the device, reads at most one word from it.

    Args:
        session: what `connect` returned.

    Raises:
        CommTimeoutError: a kernel gave up waiting for a peer.
        CommError: anything else that makes earlier results wrong.
    """


@hookspec(firstresult=True)
def close(session: Any, orderly: bool) -> None:
    """Give back all that the session holds.

    Local, optional, idempotent. Only for a session that `connect` returned.

    Args:
        session: what `connect` returned.
        orderly: True: every rank has finished its work and none will call again. False: something failed; abort, wait
            for nobody.

    Raises:
        Whatever it raises is logged; the other sessions are closed all the same.
    """
