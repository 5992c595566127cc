"""The hooks of a backend plugin. This file is the contract; `docs/writing-a-plugin.md` is the introduction.

A plugin is a module, or an object, that the entry-point group `comm_core.backends` names. It sets
`COMM_HOOK_API = (1, 0)` and marks its hooks with `@comm_core.hookimpl`. Only `all_reduce` is required.

An implementation has exactly the parameters of its spec, in the same order, without defaults: the hot path is resolved
once per group and called by position. *Local* hooks talk to no other rank. *Collective* hooks run on every rank of
the group at once, and may exchange data through `context.control`; the ranks then vote on the hook's success. A
`session` is what `connect` returned; without `connect`, the `GroupContext`.

All hooks but `limits`, `waits`, `padded_session` and those of the hot path run under a deadline, in a thread with the
group's device and the caller's stream set. A hook that misses its deadline has failed. Its thread can't be stopped: it
stays until the hook returns, and keeps what it holds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from comm_core.context import GroupContext, Shapes
    from comm_core.topology import Topology
    from comm_core.tuning import VariantChoice
    from comm_core.types import Available, Range, Unavailable

__all__ = ["API", "PROJECT", "hookimpl", "hookspec"]

API = (1, 0)
"""The version of these specs, (major, minor). A plugin's `COMM_HOOK_API` has this major and a minor no higher."""
PROJECT = "comm_core"
"""This project's name in pluggy."""

hookspec = pluggy.HookspecMarker(PROJECT)
"""The marker of a hook's specification; only this module uses it."""
hookimpl = pluggy.HookimplMarker(PROJECT)
"""The marker of a plugin's function that implements the hook of the same name."""


@hookspec(firstresult=True)
def probe() -> dict[str, Any]:  # type: ignore[empty-body]
    """Report facts that only this plugin knows, such as a missing compiler.

    Local, optional. Called once per group, on every rank, before anything is allocated. The ranks exchange the facts;
    `is_available` reads them as `topology.ranks[i].facts[name]`. All plugins' calls together get half of
    `COMM_CORE_CONTROL_TIMEOUT_S`, so that this rank comes to the exchange in time.

    Returns:
        A JSON object of at most 512 bytes as text, nested at most 16 levels deep. If the facts of all installed
        backends don't fit into one message, the backends with the largest are refused. The fact "missing" is the reason
        why the backend can't be used on this host, None if it can; see `eligibility.missing_dependency`. Report the
        other facts in either case, None if unknown: `comm-core explain --topology` asks about machines without lacks.

    Raises:
        Exception: of any type: the backend is unavailable for this group, with the exception's text as the reason. A
            larger result, one that isn't JSON, or a missed deadline has the same effect.
    """


@hookspec(firstresult=True)
def is_available(topology: Topology) -> Available | Unavailable:  # type: ignore[empty-body]
    """Say whether this backend can serve the group that `topology` describes.

    Local, optional: without it the backend is available at priority 500, for every message that its hooks can take.
    Called once per group, on every rank, before anything is allocated. The answer depends on `topology` alone. If the
    ranks' answers differ, the lowest priority and the intersection of the ranges apply. Same deadline as `probe`.

    Args:
        topology: the reports of all ranks, frozen; see `comm_core.Topology`.

    Returns:
        `Available(priority, ranges)`: a higher priority is tried first; `ranges` cover only the operations, dtypes,
        modes and sizes (bytes) that the backend's kernels take; at most 64 ranges. `Unavailable(reason)`: one sentence
        without a full stop; `explain` prints it, control characters replaced, and at most 1,000 bytes of it.

    Raises:
        Exception: of any type: read as `Unavailable`, with its text as the reason, as is a missed deadline.
    """


@hookspec(firstresult=True)
def connect(topology: Topology, context: GroupContext) -> Any:
    """Build, allocate and exchange everything that the admission test needs; return the session.

    Collective, optional: without it the session is the `GroupContext`. Called at most once per group, and only if the
    backend would serve some message, in a thread of its own with the group's device and the caller's stream set. Do
    everything that can fail on one rank alone before the first exchange. Never called while a graph is captured.

    Args:
        topology: as in `is_available`.
        context: the group, this rank's place in it, and the channel to its peers; see `comm_core.GroupContext`.

    Returns:
        The session: any object but None; it is the first argument of every later hook. Its attribute `memory_nbytes`,
        if present, is its share of `context.memory_budget_nbytes`.

    Raises:
        Exception: of any type: every rank drops this backend for this group, for good. A missed deadline
            (`COMM_CORE_CONNECT_TIMEOUT_S`) has the same effect. A `connect` that raises frees its own resources first;
            a session that arrives after the deadline is closed, not used.
    """


@hookspec(firstresult=True)
def pre_capture_init(session: Any, shapes: Shapes) -> Sequence[Range] | None:
    """Prepare everything that a capture of `shapes` would otherwise do lazily: build, allocate, exchange.

    Collective, optional. Called from `comm.pre_capture_init`, any number of times, on every rank with the same shapes;
    earlier preparations stay valid. Runs like `connect`. Only `comm.pre_capture_init` connects a backend whose ranges
    all have `prepared=True`. `shapes` has `max_tokens` and `hidden_size` of `[num_tokens, hidden_size]`, and `dtype`.

    Returns:
        All ranges served from now on, at most 64, including those with `prepared=True`; or None if nothing changes.
        Core intersects the ranks' answers, tests the new ranges and computes the routes again.

    Raises:
        Exception: of any type: every rank drops this backend for this group, as by a `memory_nbytes` above the budget
            after the call. Free this call's resources before raising. A session that has served a call stays open until
            the group is closed: earlier graphs may use its memory.
    """


@hookspec(firstresult=True)
def capture_ctx(session: Any) -> AbstractContextManager[Any]:  # type: ignore[empty-body]
    """Return the context in which this session's calls are recorded into CUDA graphs.

    Optional. Called once for each outermost `comm.capture()`, whether or not a call of this group is captured; the
    admission test calls it too, if the ranges name the mode "graph". Inside it, calls on a stream that isn't capturing
    (`torch.cuda.is_current_stream_capturing()`), such as warm-ups, run at once. It is entered and left in different
    threads, neither of them the caller's. Entering has half of `COMM_CORE_CONTROL_TIMEOUT_S`, leaving twice its value.

    Entering is Local. Leaving is Collective if a recorded call needs an exchange over `context.control`; a session
    without such a call must not exchange anything, since its peers may have captured nothing. Leaving by an exception
    discards the recorded calls without an exchange. A generator needs `contextlib.contextmanager` after `@hookimpl`.
    Its value is ignored, and it must not swallow exceptions.

    Raises:
        Exception: on entering: the sessions entered before this one leave by exception. On leaving: if the ranks
            exchanged something, all of them raise it as `CaptureError`; otherwise only this rank does.
    """


@hookspec(firstresult=True)
def all_reduce(session: Any, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:  # type: ignore[empty-body]
    """Sum `tensor` over the ranks of the group, elementwise. The hot path.

    Required. Called on every rank, in the same order, with tensors of one shape and dtype, on the caller's thread and
    current stream. May run while a graph is captured, if its ranges name the mode "graph".

    Args:
        session: the result of `connect`, else the `GroupContext`; on padded batches, of `padded_session`.
        tensor: any shape, at least one element, contiguous, aligned to 16 bytes, within the ranges.
        out: receives the sum: a tensor of the same shape, dtype and device, contiguous, aligned to 16 bytes; `tensor`
            itself or disjoint from it. None: allocate it, and leave `tensor` unchanged.

    Returns:
        `out`, or the allocated tensor.

    Raises:
        CommTimeoutError: a peer didn't arrive within `context.wait_timeout_s`; the session's later calls raise too.
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
    `all_reduce`. Core composes calls without a residual, and with a float32 residual or weight beside a 16-bit tensor.

    A backend with `Available(checks_operands=True)` may also get operands that break the preconditions below: core has
    then checked only that the device index, dtype and shape of `tensor` are within the ranges. The backend checks the
    rest (`comm_core/operands.h`) and returns `NotImplemented`; core then raises an error, or calls again with copies.
    Strides and addresses differ, so in one call some ranks may get the caller's operands and others copies.

    Args:
        session: as in `all_reduce`.
        tensor: `[num_tokens, hidden_size]`, floating point, contiguous, aligned to 16 bytes.
        residual: like `tensor`; the same values on every rank.
        weight: `[hidden_size]`, the dtype of `tensor`; the same values on every rank.
        eps: added to the mean square.
        weight_offset: added to the weight, 1.0 for Gemma's norms.
        out: receives `y`: like `tensor`, or `tensor` itself; None: allocate it.
        residual_out: receives `s`: like `tensor`, or `residual` itself; None: allocate it.

    Returns:
        `(y, s)`: `out` and `residual_out`, or the allocated tensors. Or `NotImplemented`, before anything is sent or
        written: core composes the call from an all-reduce and a norm. For operands that meet the preconditions this
        answer must be the same on every rank: it may depend on shape, dtype, `eps` and `weight_offset`, but not on
        addresses or on the outputs that are None.

    Raises:
        Exception: as in `all_reduce`. If core then finds an invalid operand that it hadn't validated, it raises an
            error for that operand instead.
    """


@hookspec(firstresult=True)
def all_reduce_add_rms_norm_quant(
    session: Any,
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
) -> None:
    """Sum over the ranks, add the residual, normalise and quantise the norm to FP8, in one call. Hot path.

    Optional. `y` and `s` as in `all_reduce_add_rms_norm`: if the backend has that hook, with its bits, and declined
    where it declines. Values and scales have the bits of `comm_core.fallback.quantize` of the rounded `y`. Core
    validates the operands. Those up to `weight_offset` are as there; then come:

    - `quant`: one of `comm_core.types.QUANTS`; for "fp8_per_group", `hidden_size` is a multiple of 128.
    - `scale`: float32. "fp8_static": one element, read. Else written, aligned to 16 bytes: `[num_tokens, 1]`, or for
      groups `[num_tokens, hidden_size / 128]`, contiguous, or column-major with any distance between columns.
    - `out`: receives the quantised values: float8_e4m3fn `[num_tokens, hidden_size]`, contiguous, aligned to 16 bytes.
    - `residual_out`: receives `s`: like `tensor`, or `residual` itself.
    - `norm_out`: receives `y`: like `tensor`, or `tensor` itself; None: the caller doesn't need it.

    Returns:
        None, or `NotImplemented` as in `all_reduce_add_rms_norm`: it may depend on `quant`, too, not on `norm_out`.

    Raises:
        Exception: as in `all_reduce`.
    """


@hookspec(firstresult=True)
def padded_session(session: Any, num_tokens: torch.Tensor) -> Any:
    """Return the object that takes the session's place in hot-path calls on padded batches.

    Local, optional: without it, all rows are summed. Called by the first call with this `num_tokens`, on the caller's
    thread, maybe while a graph is captured: launch nothing. `num_tokens` is int32, one element, on the group's device,
    equal on all ranks. Kernels of these calls read it when they run, after the stream's earlier work: the first
    `num_tokens` rows of `[..., hidden_size]` are real (below 0 means none, above the rows all of them), and have the
    results of a call on them alone, over no quantised wire. The other rows of outputs are unspecified. Core keeps the
    tensor and the result until the session is closed.

    Returns:
        Any object but None; or `NotImplemented`, on all ranks: all rows are summed.

    Raises:
        Exception: as in `all_reduce`.
    """


@hookspec(firstresult=True)
def suspend(session: Any) -> None:
    """Give the session's physical device memory back, and keep its addresses reserved.

    Collective, optional; a plugin implements both `suspend` and `resume`, or neither: then its sessions keep their
    memory. Called from `comm.suspend`, on every rank, for each session that has ever served the group, in the order of
    their `connect`. By then every rank has stopped calling and its device has finished; errors of earlier kernels have
    been asked for by `check`. Runs like `connect`.

    The contents of the memory are lost. A peer may still have this rank's memory mapped when this is called, so an
    exchange belongs before anything that peers must have unmapped first. Until `resume`, core calls no other hook of
    the session but `close`.

    Raises:
        Exception: of any type: every rank raises it as a `CommError` that names the backend and the rank, and the
            group's handle stops for good; core doesn't call `resume`, but `close` with `orderly=False` once the caller
            closes the group. A missed deadline has the same effect.
    """


@hookspec(firstresult=True)
def resume(session: Any) -> None:
    """Take the device memory again that `suspend` gave back, at the same addresses, and initialise it.

    Collective; see `suspend`. Called from `comm.resume`, on every rank, in the same order, once for each `suspend` that
    succeeded on every rank. Afterwards the session serves calls, and graphs that were captured before are replayed: set
    up everything that their kernels read, such as flags and counters, on all ranks, before this returns on any rank.
    Runs like `suspend`.

    Raises:
        Exception: as in `suspend`. Free what this call has taken before raising.
    """


@hookspec(firstresult=True)
def variants(session: Any, op: str, nbytes: int, num_tokens: int) -> Sequence[str]:  # type: ignore[empty-body]
    """Return the ways in which the backend can serve a message, as texts: its algorithms and launch shapes.

    Local, optional; a plugin has both this hook and `use_variants`, or neither. Called by `comm-core tune` for messages
    within the ranges; `num_tokens` is the number of rows of a fused operation's message, otherwise 0. The answer is the
    same on every rank. The way in use comes first, the others follow, the most promising first: a quick run tries only
    some. Each serves all messages of the operation, of any size, shape and dtype, with the same bits.

    Raises:
        Exception: of any type: reaches the caller.
    """


@hookspec(firstresult=True)
def use_variants(session: Any, choices: Sequence[VariantChoice]) -> None:
    """Serve messages by these choices from now on, and those of no choice by the backend's own table.

    Local, optional; see `variants`. Called on every rank with equal choices, whose sizes ascend and don't overlap:
    after `connect`, before the admission test, if the group's tuned table has some for this backend; and by `comm-core
    tune` between calls. Each call replaces the choices of before; () leaves none. Captured graphs stay as they are.

    Raises:
        ValueError: it has no such variant. After `connect`, this or any other exception drops the backend on every
            rank; from `comm-core tune`, it reaches the caller.
    """


@hookspec(firstresult=True)
def limits(session: Any) -> dict[str, float]:  # type: ignore[empty-body]
    """Measure lower bounds of this backend's times on this machine, in microseconds, by their descriptions.

    Collective, optional. Called from `backend.limits()`, and so by `comm-core demo` and `comm-core bench`; may take a
    few tenths of a second. Never called while a graph is captured.

    Raises:
        Exception: of any type: reaches the caller.
    """


@hookspec(firstresult=True)
def waits(session: Any) -> Mapping[int, tuple[int, float, float]]:  # type: ignore[empty-body]
    """Return how long this rank's calls have waited for each peer so far.

    Local, optional; waits for nothing. Called from `backend.waits()`, maybe while another thread is in `all_reduce`.
    The result has by the peer's group rank: the number of waits, their total time and the longest one, in microseconds;
    `comm_core.kernels.waits_by_rank` makes it. Waits in every exchange needn't count, nor those of running kernels.

    Raises:
        Exception: of any type: reaches the caller.
    """


@hookspec(firstresult=True)
def check(session: Any) -> None:
    """Raise the errors that kernels recorded since the last call, such as a timed-out wait for a peer.

    Local, optional. Called from `backend.check()`, in a thread that a group's sessions share; may synchronise with the
    device; reads at most one word from it. The deadline is `context.wait_timeout_s`.

    After `abort` it raises only if a kernel has run since the last call, so that `backend.check()` can report the
    replay of a graph that was captured before `comm.recover`. Core doesn't ask a session that raises each time.

    Raises:
        CommTimeoutError: a kernel gave up waiting for a peer.
        CommError: another error makes earlier results wrong.
    """


@hookspec(firstresult=True)
def abort(session: Any) -> None:
    """Let the other ranks' waits for this rank end: its handle has stopped after a failure.

    Local, optional; without it the waits end by their deadline. Called once, on the rank whose hook raised and on each
    rank that learns of it, maybe while another thread is in `all_reduce`; and on all ranks by `comm.recover`, which
    replaces the session. Waits for nothing and frees nothing: `close` follows from `comm.recover` or when the caller
    closes the group.

    Raises:
        Exception: of any type: logged.
    """


@hookspec(firstresult=True)
def close(session: Any, orderly: bool) -> None:
    """Free all resources of the session.

    Local, optional, idempotent. Called only for a session that `connect` returned. The deadline is
    `context.wait_timeout_s`; it is at most 5 s where the other ranks wait, for a session that was never in use.

    Args:
        session: maybe suspended, or, after a failure, suspended in part.
        orderly: True: every rank has finished its work, and none will call again. False: abort, and wait for no rank.

    Raises:
        Exception: of any type, as `SystemExit`: logged, as is a missed deadline; core still closes the other sessions.
        KeyboardInterrupt: raised to the caller once everything is closed.
    """
