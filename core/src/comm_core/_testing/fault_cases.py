"""What ranks do in conformance tests with a fault: a hook of the last rank fails, hangs, is late, or its process dies.

As in `cases`, each function has the backend's name as its first parameter, and raises `AssertionError` with the broken
rule. After each fault the live ranks must report the same outcome, what the backend took must be given back within
`release_s` seconds, and a new group must work.
"""

from __future__ import annotations

import copy
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._plugins.discovery import replaced_hook
from comm_core._testing.cases import count_held
from comm_core._testing.handles import (
    WARM_HANDLES,
    call_and_check,
    check_sum,
    first_call,
    open_handle,
    prepare_if_needed,
    synchronize,
)

__all__ = [
    "a_call_fails",
    "a_group_recovers",
    "a_rank_is_killed_in_connect",
    "connect_fails",
    "connect_is_slow",
    "preparing_fails",
    "suspending_fails",
]

#: The text of the error that a hook raises.
FAULT = "a fault made by the conformance kit"
# The timeout of `get_backend` for a group in which a rank hangs, in seconds.
_HANG_TIMEOUT_S = 5.0
# The timeout of `get_backend` for a group in which a rank's call in a hook is missing, in seconds: below torch's in the
# kit.
_CALL_TIMEOUT_S = 15.0
# GPU memory that a rank may take for kernels which CUDA loads at their first call, in MiB.
_LOADED_MIB = 8
# How long a rank hangs at most, in seconds.
_HANG_S = 60.0


class _NumberedChannel:
    """A channel that calls a function before each exchange (each use of the channel), numbered from 1."""

    def __init__(self, control: comm.ControlChannel, before: Callable[[int], None]) -> None:
        self._control, self._before, self._calls = control, before, 0

    def __getattr__(self, name: str) -> Any:
        self._calls += 1
        self._before(self._calls)
        return getattr(self._control, name)


def _is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def _raise_on_last(original: Callable[..., Any], *arguments: Any) -> Any:
    """Replace a hook that raises on the last rank."""
    if _is_last():
        raise RuntimeError(FAULT)
    return original(*arguments)


def _raise_on_last_if(fails: threading.Event, original: Callable[..., Any], *arguments: Any) -> Any:
    """Replace a hook that raises on the last rank once `fails` is set."""
    return _raise_on_last(original, *arguments) if fails.is_set() else original(*arguments)


def _warm_up(name: str) -> dict[str, int]:
    for _ in range(WARM_HANDLES):
        _check_new_handle(name)
    _check_new_handle(name, fallback=True)
    return count_held()


def _check_new_handle(name: str, *, fallback: bool = False) -> str:
    """Get a new handle of the backend, and check one call; return its hook.

    With `fallback`, call that, too, which keeps its buffers.
    """
    with open_handle(name) as backend:
        hook = _check_call(name, backend, "after a fault")
        if fallback:
            dist.all_reduce(torch.ones(1000, device=backend.device))
    return hook


def _check_call(name: str, backend: comm.Backend, what: str) -> str:
    """Check a call that the backend serves; return its hook."""
    call = first_call(name, backend)
    call.check_results(call(), what)
    return call.hook


def _check_nothing_left(before: dict[str, int], what: str, release_s: float, *, in_use: bool = False) -> None:
    """Compare what the process holds with `before`, for as long as threads of the fault may take to end.

    Args:
        before: what it held before.
        what: the fault, for the error.
        release_s: how long it may take, in seconds.
        in_use: whether calls of the session may not have ended: it may keep its memory, which peers may still write.
    """
    # Segments aren't compared: those of the machine's other programs come and go.
    kinds = ["threads"] if in_use else [kind for kind in before if kind != "segments in /dev/shm"]
    allowed = {"MiB of GPU memory": _LOADED_MIB}
    end = time.monotonic() + release_s
    while True:
        held = count_held()
        grown = {kind: held[kind] - before[kind] for kind in kinds}
        left = {kind: by for kind, by in grown.items() if by > allowed.get(kind, 0)}
        if not left or time.monotonic() > end:
            break
        time.sleep(0.1)
    assert not left, f"{what} left on rank {dist.get_rank()}: {left}"


def _check_dropped(name: str, what: str, reason: str, timeout_s: float | None = None) -> None:
    """Get a handle that the backend can't serve, on all ranks for the same reason; its sums are right all the same."""
    backend = comm.get_backend(timeout_s=timeout_s)
    prepare_if_needed(backend, name)
    candidate = backend.decision.candidate(name)
    assert candidate is not None
    assert candidate.verdict == "failed", f"{what}: the verdict is {candidate.verdict}"
    assert reason in candidate.reason, f"{what}: the reason is {candidate.reason!r}"
    check_sum(backend, backend.device, torch.float32, 1000, f"the fallback after {what}")
    synchronize(backend)
    comm.close()


def connect_fails(name: str, release_s: float) -> None:
    """`connect` raises on the last rank: at its begin and at each exchange; then it hangs."""
    last, before = _is_last(), _warm_up(name)
    exchanges, hanging = [0], threading.Event()

    def counted(original: Callable[..., Any], topology: Any, context: comm.GroupContext) -> Any:
        def count(number: int) -> None:
            exchanges[0] = number

        return original(topology, _with_control(context, count))

    def failing(original: Callable[..., Any], topology: Any, context: comm.GroupContext, *, at: int) -> Any:
        def fail(number: int) -> None:
            if last and number == at:
                raise RuntimeError(FAULT)

        fail(0)
        return original(topology, _with_control(context, fail))

    def hang(original: Callable[..., Any], topology: Any, context: comm.GroupContext) -> Any:
        if last:
            hanging.wait(_HANG_S)
        return original(topology, context)

    with replaced_hook(name, "connect", counted):
        _check_new_handle(name)
    for at in range(exchanges[0] + 1):
        where = f"connect that raised on one rank in exchange {at}" if at else "connect that raised on one rank"
        with replaced_hook(name, "connect", functools.partial(failing, at=at)):
            for _ in range(2):
                _check_dropped(name, where, FAULT)
        _check_nothing_left(before, where, release_s)
    where = "connect that hung on one rank"
    with replaced_hook(name, "connect", hang):
        _check_dropped(name, where, "", _HANG_TIMEOUT_S)
    hanging.set()  # it goes on, too late
    dist.barrier()
    _check_nothing_left(before, where, release_s)
    _check_new_handle(name)


def _with_control(context: comm.GroupContext, before: Callable[[int], None]) -> comm.GroupContext:
    """Return the context with another channel."""
    changed = copy.copy(context)  # unlike `dataclasses.replace`, it doesn't read `group`, which makes one
    vars(changed)["control"] = _NumberedChannel(context.control, before)
    return changed


def connect_is_slow(name: str, delay_s: float) -> None:
    """The last rank comes late to `connect`, and late into each of its exchanges."""

    def slow(original: Callable[..., Any], topology: Any, context: comm.GroupContext) -> Any:
        def wait(_: int) -> None:
            if _is_last():
                time.sleep(delay_s)

        wait(0)
        return original(topology, _with_control(context, wait))

    with replaced_hook(name, "connect", slow):
        _check_new_handle(name)


def a_rank_is_killed_in_connect(name: str, release_s: float) -> None:
    """The last rank dies at the first exchange of `connect`, or at its end: the others get an error."""
    before = _warm_up(name)

    def die(original: Callable[..., Any], topology: Any, context: comm.GroupContext) -> Any:
        def kill(_: int) -> None:
            if _is_last():
                os.kill(os.getpid(), signal.SIGKILL)

        original(topology, _with_control(context, kill))
        kill(0)
        raise AssertionError("connect returned without the killed rank's exchange")

    with replaced_hook(name, "connect", die):
        try:
            prepare_if_needed(comm.get_backend(timeout_s=_HANG_TIMEOUT_S), name)
        except comm.CommError:
            pass
        else:
            raise AssertionError("get_backend returned without the killed rank")
    _check_nothing_left(before, "connect, during which a rank was killed,", release_s)


def a_call_fails(name: str, absent: bool, release_s: float) -> None:
    """The last rank's call raises, or is missing: every rank's calls end in an error, and keep to it."""
    last, before, fails = _is_last(), _warm_up(name), threading.Event()
    what = "a call without one rank" if absent else "a call that raised on one rank"
    with replaced_hook(name, _check_new_handle(name), functools.partial(_raise_on_last_if, fails)):
        # Calls in `context.group` over Gloo wait as long as `connect` may take.
        backend = comm.get_backend(backends=(name,), timeout_s=_CALL_TIMEOUT_S)
        prepare_if_needed(backend, name)
        _check_call(name, backend, "before the fault")
        synchronize(backend)
        if not absent:
            fails.set()
        if not (absent and last):
            error = _error_of_calls(name, backend, what)
            assert not last or FAULT in error, f"{what}: that rank's error is {error!r}"
        dist.barrier()
        if absent and last:  # it hears of its peers' time-out
            _error_of_calls(name, backend, what)
        again = _error_of_calls(name, backend, f"a call after {what}")
        assert again, "a later call must raise, too"
        comm.close()
    del backend
    _check_nothing_left(before, what, release_s, in_use=True)
    dist.barrier()
    _check_new_handle(name)


def a_group_recovers(name: str, release_s: float) -> None:
    """All ranks recover after a misuse, with the backend, and after its call raised on the last rank, without it."""
    last, before, fails = _is_last(), _warm_up(name), threading.Event()
    with replaced_hook(name, _check_new_handle(name), functools.partial(_raise_on_last_if, fails)):
        backend = comm.get_backend(timeout_s=_CALL_TIMEOUT_S)
        prepare_if_needed(backend, name)
        _check_call(name, backend, "before comm.recover")
        synchronize(backend)
        if last:
            backend._serving.fail("a misuse made by the conformance kit")
        comm.recover()
        prepare_if_needed(backend, name)
        _check_call(name, backend, "after comm.recover")
        synchronize(backend)
        fails.set()
        _error_of_calls(name, backend, "a call that raised on one rank")
        comm.recover(timeout_s=2 * _CALL_TIMEOUT_S)  # a peer's call may wait as long as `connect`
        candidate = backend.decision.candidate(name)
        assert candidate is not None
        dropped = (candidate.verdict, FAULT in candidate.reason)
        assert dropped == ("failed", True), f"after comm.recover: {candidate}"
        check_sum(backend, backend.device, torch.float32, 1000, "the fallback after comm.recover")
        synchronize(backend)
        comm.close()
    del backend
    _check_nothing_left(before, "comm.recover", release_s, in_use=True)
    dist.barrier()
    _check_new_handle(name)


def _error_of_calls(name: str, backend: comm.Backend, what: str) -> str:
    """Call, and return the error."""
    try:
        call_and_check(name, backend)
    except comm.CommError as error:
        return str(error)
    except RuntimeError as error:
        assert FAULT in str(error), f"{what} raised {type(error).__name__}, not a CommError: {error}"
        return str(error)
    raise AssertionError(f"{what} returned on rank {dist.get_rank()}")


def preparing_fails(name: str, release_s: float) -> None:
    """`pre_capture_init` raises on the last rank."""
    before = _warm_up(name)
    what = "pre_capture_init that raised on one rank"
    with replaced_hook(name, "pre_capture_init", _raise_on_last):
        backend = comm.get_backend(timeout_s=_CALL_TIMEOUT_S)
        comm.pre_capture_init(max_tokens=4, hidden_size=64, dtype=torch.float32)
        candidate = backend.decision.candidate(name)
        assert candidate is not None
        assert (candidate.verdict, FAULT in candidate.reason) == ("failed", True), f"{what}: {candidate}"
        check_sum(backend, backend.device, torch.float32, 256, f"the fallback after {what}")
        synchronize(backend)
        comm.close()
    del backend  # it holds a connection to the store
    _check_nothing_left(before, what, release_s)
    _check_new_handle(name)


def suspending_fails(name: str, release_s: float) -> None:
    """`suspend`, and then `resume`, raises on the last rank: the handle stops on all ranks, and can be closed."""
    before = _warm_up(name)
    for hook in ("suspend", "resume"):
        what = f"{hook} that raised on one rank"
        with replaced_hook(name, hook, _raise_on_last):
            backend = comm.get_backend(backends=(name,))
            try:
                comm.suspend()
                comm.resume()
            except comm.CommError as error:
                assert FAULT in str(error), f"{what}: the error is {error}"
            else:
                raise AssertionError(f"{what} raised nothing on rank {dist.get_rank()}")
            _error_of_calls(name, backend, f"a call after {what}")
            comm.close()
        del backend
        _check_nothing_left(before, what, release_s, in_use=True)
    _check_new_handle(name)
