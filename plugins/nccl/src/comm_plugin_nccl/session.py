"""A group's session: its communicator, and how a failure ends it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import comm_core as comm
import torch

from comm_plugin_nccl import peers

__all__ = ["SUM", "Session", "connect"]

_log = logging.getLogger(__name__)

#: `ncclSum` of `ncclRedOp_t` in nccl.h.
SUM = 0
# `ncclSuccess` and `ncclInProgress` of `ncclResult_t`.
_NO_ERROR = (0, 7)
# The time between the refusal of further calls and the communicator's abort, in seconds. In this time a call that is
# under way ends unless it waits for a peer, and so does a kernel that has received all it needs.
_ABORT_DELAY_S = 0.5
# How long an orderly close waits for NCCL, in seconds. NCCL needs far less, unless graphs that recorded its calls still
# exist.
_DESTROY_TIMEOUT_S = 5.0
# The interval between two checks of the peers while NCCL creates a communicator, in seconds.
_CONNECT_POLL_S = 0.2


class Session:
    """This rank's part of the group.

    Attributes:
        launch: the binding's `all_reduce`; after a failure or `close`, a function that raises the reason.
        communicator: the binding's communicator.
        current_stream: a function from a device's index to its current stream as an integer.
        device_index: the index of `device`.
        device: this rank's device.
        binding_error: the exception type that the binding raises.
        control: the group's channel.
    """

    def __init__(
        self,
        binding: Any,
        communicator: Any,
        device: torch.device,
        current_stream: Callable[[int], int],
        process: peers.OwnProcess,
        processes: peers.PeerProcesses,
        control: comm.ControlChannel,
    ) -> None:
        self.control = control
        self.launch: Callable[..., object] = binding.all_reduce
        self.communicator = communicator
        self.current_stream = current_stream
        self.device_index: Any = device.index
        self.device = device
        self.binding_error: type[Exception] = binding.NCCLError
        self._binding = binding
        self._process = process
        self._make_failure: Callable[[], comm.CommError] | None = None
        self._released = False
        self._lock = threading.Lock()
        self._watcher = peers.Watcher(processes, self._on_wake)

    def check(self) -> None:
        """Raise the reason why the session has failed, after asking NCCL for new errors.

        Raises:
            CommTimeoutError: a peer's process has ended, or its handle has stopped.
            CommError: NCCL noticed an error, or the session is closed.
        """
        self._query_nccl()
        if self._make_failure is not None:
            raise self._make_failure()

    def raise_failure(self, error: Exception) -> NoReturn:
        """Raise the reason for an error of the binding: the session's failure, else NCCL's own error text."""
        if self._make_failure is not None:
            raise self._make_failure() from error
        raise comm.CommError(f"NCCL: {error}{self._details()}") from error

    def synchronize(self) -> None:
        """Wait until the current stream has done its work."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def abort(self) -> None:
        """Refuse further calls, and end the kernels that wait, here and at the peers. Idempotent; doesn't wait."""
        self._fail(functools.partial(comm.CommError, "this rank's handle has stopped"))
        self._process.stop()
        self._abort()

    def close(self, orderly: bool) -> None:
        """Refuse further calls, and destroy the communicator; after a failure abort it without waiting. Idempotent."""
        self._watcher.stop()
        self._fail(functools.partial(comm.CommError, "its session is closed"))
        if orderly:
            self._release(self._binding.comm_destroy, 0.0, _DESTROY_TIMEOUT_S)
        else:
            self._process.stop()
            self._abort()
        self._process.close()

    def _on_wake(self, events: tuple[peers.PeerEvent, ...]) -> bool:
        """Look for a failure, in the watcher's thread; after one abort, which ends kernels that wait."""
        if events:  # the other peers on this machine notice them, too
            self._fail(functools.partial(peers.error_of, events))
        else:
            self._query_nccl()
        if self._make_failure is None:
            return False
        self._abort()
        return True

    def _abort(self) -> None:
        """End the kernels that wait for a peer."""
        self._release(self._binding.comm_abort, _ABORT_DELAY_S, 0.0)

    def _query_nccl(self) -> None:
        """Fail if NCCL has noticed an error by itself, such as a broken network."""
        with self._lock:
            if self._released:
                return
            code = int(self._binding.comm_get_async_error(self.communicator))
        if code not in _NO_ERROR:
            text = f"NCCL: {self._binding.get_error_string(code)}{self._details()}"
            self._fail(functools.partial(comm.CommError, text))

    def _details(self) -> str:
        """Return NCCL's last error text of the process, in parentheses; "" if there is none, or no communicator."""
        with self._lock:
            return "" if self._released else _last_error(self._binding, self.communicator)

    def _fail(self, make_failure: Callable[[], comm.CommError]) -> None:
        """Make every later call raise this, unless the session has failed before."""
        with self._lock:
            if self._make_failure is None:
                self._make_failure = make_failure
                self.launch = functools.partial(_raise, make_failure)

    def _release(self, end: Callable[[Any], object], delay_s: float, wait_s: float) -> None:
        """End the communicator once, in a thread: NCCL waits for its kernels, and for graphs that recorded them."""
        with self._lock:
            if self._released:
                return
            self._released = True
        thread = threading.Thread(
            target=_end, args=(end, self.communicator, delay_s), name="comm-core nccl: end", daemon=True
        )
        thread.start()
        thread.join(wait_s)
        if wait_s and thread.is_alive():
            _log.warning("NCCL keeps a communicator's memory until the CUDA graphs that recorded its calls are gone")


def connect(
    binding: Any, current_stream: Callable[[int], int], topology: comm.Topology, context: comm.GroupContext
) -> Session:
    """Create the group's communicator. Collective.

    Args:
        binding: nccl4py's low-level module.
        current_stream: a function from a device's index to its current stream.
        topology: the group's topology.
        context: the group.

    Raises:
        CommTimeoutError: a peer's process has ended, or its `connect` has failed.
        CommError: NCCL failed; with its error text.
    """
    unique_id = bytes(binding.get_unique_id()) if context.rank == 0 else b""
    with contextlib.ExitStack() as stack:  # what a failure gives back
        process = peers.OwnProcess()
        stack.callback(process.close)
        try:
            exchanged = context.control.all_gather({"id": unique_id.hex(), **process.describe()})
            stack.callback(process.stop)
            processes = peers.open_processes(topology, context.rank, context.global_ranks, exchanged)
        except BaseException:
            if unique_id:
                _release_unused(binding, bytearray(unique_id), context.device)
            raise
        stack.callback(processes.close)
        communicator = _create_communicator(binding, bytearray.fromhex(exchanged[0]["id"]), context, processes)
        stack.pop_all()
    return Session(binding, communicator, context.device, current_stream, process, processes, context.control)


def _create_communicator(
    binding: Any, unique_id: bytearray, context: comm.GroupContext, processes: peers.PeerProcesses
) -> Any:
    """Create a blocking communicator in a thread, since NCCL waits forever for a peer that ends meanwhile.

    A non-blocking communicator could be aborted instead, but NCCL starts a thread for each of its calls
    (`ncclGroupEndInternal` in its src/group.cc).
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def create() -> None:
        try:
            with _on_device(context.device):
                communicator = binding.comm_init_rank(context.world_size, unique_id, context.rank)
        except BaseException as error:  # noqa: BLE001 - a thread's exception is lost unless the future carries it
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)
            return
        try:
            future.set_result(communicator)
        except concurrent.futures.InvalidStateError:  # `connect` has raised meanwhile
            _end(binding.comm_abort, communicator, 0.0)

    threading.Thread(target=create, name="comm-core nccl: init", daemon=True).start()
    while not concurrent.futures.wait([future], _CONNECT_POLL_S).done:
        events = processes.poll()
        if events and future.cancel():
            raise peers.error_of(events)
    try:
        return future.result()
    except binding.NCCLError as error:
        raise comm.CommError(f"NCCL: {error}{_last_error(binding, binding.Comm())}") from error


def _release_unused(binding: Any, unique_id: bytearray, device: torch.device) -> None:
    """Free what NCCL keeps for an id until its communicator is made: a thread and a socket that listens.

    A communicator of one rank uses the id up (`bootstrapRoot` in NCCL's src/bootstrap.cc).
    """
    with _on_device(device):
        _end(binding.comm_abort, binding.comm_init_rank(1, unique_id, 0), 0.0)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _last_error(binding: Any, communicator: Any) -> str:
    """Return NCCL's last error text of the process, in parentheses; "" if there is none."""
    text = str(binding.get_last_error(communicator)).strip()
    return f" ({text})" if text else ""


def _raise(make_failure: Callable[[], comm.CommError], *_: object) -> NoReturn:
    raise make_failure()


def _end(end: Callable[[Any], object], communicator: Any, delay_s: float) -> None:
    """End a communicator by one of the binding's functions, after a delay in seconds; log any error."""
    time.sleep(delay_s)
    try:
        end(communicator)
    except Exception:  # noqa: BLE001 - in a thread of its own: there is no caller to raise to
        _log.warning("NCCL couldn't end a communicator", exc_info=True)
