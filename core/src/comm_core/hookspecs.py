"""The hooks of a backend plugin. This file is the contract; `docs/writing-a-plugin.md` is the introduction.

A plugin is a module, or an object, that the entry-point group `comm_core.backends` names. It sets
`COMM_HOOK_API = (1, 0)` and marks its hooks with `@comm_core.hookimpl`. Only `all_reduce` is required.

An implementation has exactly the parameters of its spec, in the same order, without defaults: the hot path is looked up
once for each group and called by position. *Local* hooks talk to no other rank. *Collective* hooks run on every rank of
the group at once, under a deadline, and may talk through `context.control`; core then lets the ranks vote on how the
hook ended.
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

API = (1, 0)
"""The version of these specs, (major, minor). A plugin's `COMM_HOOK_API` has this major and a minor no higher."""
PROJECT = "comm_core"
"""The name of this project for pluggy."""

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a function as the specification of a hook; only this module uses it."""
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's function as its implementation of the hook of that name."""


@hookspec(firstresult=True)
def probe() -> dict[str, Any]:  # type: ignore[empty-body]
    """Report facts that only this plugin knows, such as a missing compiler.

    Local, optional. Called once a group, on every rank, before anything is allocated. The ranks exchange the facts;
    `is_available` finds them as `topology.ranks[i].facts[name]`.

    Returns:
        A JSON object of at most 512 bytes.

    Raises:
        Exception: of any type: the backend is unavailable for this group, with the exception's text as the reason. A
            result that is larger or isn't JSON does the same.
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
        Exception: of any type: read as `Unavailable`, with the exception's text as the reason.
    """


@hookspec(firstresult=True)
def connect(topology: Topology, context: GroupContext) -> Any:
    """Build, allocate and exchange all that admission needs.

    Collective, optional: without it the session is the `GroupContext`. Called at most once a group, and only if the
    backend would serve some message, in a thread of its own with the group's device and the caller's stream set.
    Everything that can fail on one rank alone comes before the first exchange. Never called while a graph is captured.

    Args:
        topology: as in `is_available`.
        context: the group, this rank's place in it, and the channel to its peers; see `comm_core.GroupContext`.

    Returns:
        The session: any object but None; it is the first argument of every later hook. Its attribute `memory_nbytes`,
        where there is one, is what it took of `context.memory_budget_nbytes`.

    Raises:
        Exception: of any type: every rank drops this backend for this group, for good. The end of the deadline
            (`COMM_CORE_CONNECT_TIMEOUT_S`) does the same. A `connect` that raises frees its own resources first; a
            session that arrives after the deadline is closed, not used.
    """


@hookspec(firstresult=True)
def pre_capture_init(session: Any, shapes: Shapes) -> Sequence[Range] | None:
    """Prepare everything that a capture of `shapes` would otherwise do lazily: build, allocate, exchange.

    Collective, optional. Called from `comm.pre_capture_init`, any number of times, on every rank with the same shapes;
    what is prepared only grows. Runs like `connect`: in a thread of its own, under the same deadline, and never while a
    graph is captured. A backend whose ranges all have `prepared=True` is connected only by `comm.pre_capture_init`.

    Args:
        session: what `connect` returned.
        shapes: `max_tokens` and `hidden_size` of `[num_tokens, hidden_size]`, and `dtype`.

    Returns:
        All ranges served from now on, those with `prepared=True` among them, or None where nothing changes. Core
        intersects the ranks' answers, tests what is new and computes the routes again.

    Raises:
        Exception: of any type: every rank drops this backend for this group, as it does where `memory_nbytes`, read
            again, exceeds the budget. Free what this call took before raising. A session that has served a call stays
            open until the group is closed: earlier graphs may use its memory.
    """


@hookspec(firstresult=True)
def capture_ctx(session: Any) -> AbstractContextManager[Any]:  # type: ignore[empty-body]
    """Return the context in which this session's calls are recorded into CUDA graphs.

    Optional. Called once for each outermost `comm.capture()`, on the caller's thread, whether or not a call of this
    group is captured; the admission test calls it too, if the ranges name the mode "graph". Inside it a stream may
    capture or not (`torch.cuda.is_current_stream_capturing()`): warm-ups run at once.

    Entering is Local. Leaving is Collective if calls were recorded that need an exchange, by `context.control`; a
    session that recorded none must not exchange anything, since its peers may capture nothing. Leaving by an exception
    forgets what was recorded, without an exchange. A generator function needs `contextlib.contextmanager` between
    `@hookimpl` and `def`.

    Args:
        session: what `connect` returned.

    Returns:
        A context manager; its value is ignored, and it must not swallow exceptions.

    Raises:
        Exception: on entering: the sessions entered before this one leave by exception. On leaving: where the ranks
            exchanged something, all of them raise it as `CaptureError`; otherwise only this rank does.
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
        Exception: of any other type: reaches the caller as a `CommError` that names the backend.
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

    A backend with `Available(checks_operands=True)` may also get operands that break the preconditions below: only the
    device index, dtype and shape of `tensor` are then known to be within the ranges. It checks the others itself
    (`comm_core/operands.h`) and returns `NotImplemented` if they break a precondition. Core then raises the caller's
    fault, or calls the hook again with copies. Ranks differ in where their tensors lie, so for one call some ranks may
    get operands as they are, and others copies.

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
        `(y, s)`: `out` and `residual_out`, or what was allocated. Or `NotImplemented`, before anything is sent or
        written: core composes the call from an all-reduce and a norm. For operands that meet the preconditions this
        answer must be the same on every rank: it may depend on shape, dtype, `eps` and `weight_offset`, and not on
        addresses or on which outputs are None.

    Raises:
        Exception: as `all_reduce`. If core then finds a fault in operands that it hadn't validated, it raises that
            fault instead.
    """


@hookspec(firstresult=True)
def limits(session: Any) -> dict[str, float]:  # type: ignore[empty-body]
    """Measure what bounds this backend on this machine, for comparison with its own times.

    Collective, optional. Called from `backend.limits()`, as `comm-core demo` and `comm-core bench` do; may take some
    tenths of a second. Never called while a graph is captured.

    Args:
        session: what `connect` returned, else the `GroupContext`.

    Returns:
        Times in microseconds, by a description of each bound.

    Raises:
        Exception: of any type: reaches the caller.
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
        Exception: of any type: logged; the other sessions are closed all the same.
    """
