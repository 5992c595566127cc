"""A group's session: its communicator, and what becomes of it when something fails."""

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

__all__ = ["CODES", "SUM", "Session", "connect"]

_log = logging.getLogger(__name__)

#: `ncclDataType_t` in nccl.h: everything that NCCL sums and core routes.
CODES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
#: `ncclSum` of `ncclRedOp_t`.
SUM = 0
# `ncclSuccess` and `ncclInProgress` of `ncclResult_t`.
_FINE = (0, 7)
# Between the refusal of further calls and the communicator's abort, in seconds: a call that is under way ends, unless
# it waits for a peer, and so does a kernel whose peers have sent all that it needs.
_GRACE_S = 0.5
# How long an orderly close waits for NCCL, in seconds: far more than its own work takes. What keeps it longer are
# graphs that recorded its calls and still exist.
_DESTROY_S = 5.0
# Between two looks at the peers while NCCL makes a communicator, in seconds.
_LOOK_S = 0.2


class Session:
    """What the hooks work with.

    Attributes:
        launch: the binding's `all_reduce`; in its place, once the session has failed or is closed, what raises why.
        communicator: the binding's.
        stream_of: tells a device's current stream.
        index: of the device.
        device: with that index.
        refusal: what the binding raises.
    """

    def __init__(
        self,
        binding: Any,
        communicator: Any,
        device: torch.device,
        stream_of: Callable[[int], int],
        processes: peers.Processes,
    ) -> None:
        self.launch: Callable[..., object] = binding.all_reduce
        self.communicator = communicator
        self.stream_of = stream_of
        self.index: Any = device.index
        self.device = device
        self.refusal: type[Exception] = binding.NCCLError
        self._binding = binding
        self._processes = processes
        self._failure: Callable[[], comm.CommError] | None = None
        self._given_back = False
        self._lock = threading.Lock()
        self._watch = peers.Watch(processes, self._see)

    def check(self) -> None:
        """Raise why the session has failed; asks NCCL for an error that came up since."""
        self._ask()
        if self._failure is not None:
            raise self._failure()

    def failed(self, error: Exception) -> NoReturn:
        """Raise, with NCCL's words, what became of a call that the binding refused."""
        if self._failure is not None:  # which is why
            raise self._failure() from error
        raise comm.CommError(f"NCCL: {error}{self._details()}") from error

    def close(self, orderly: bool) -> None:
        """Refuse further calls and give the communicator back: destroyed in order, else aborted without waiting."""
        self._watch.stop()
        self._fail(functools.partial(comm.CommError, "its session is closed"))
        if orderly:
            self._give_back(self._binding.comm_destroy, 0.0, _DESTROY_S)
        else:
            self._give_back(self._binding.comm_abort, _GRACE_S, 0.0)

    def _see(self, gone: tuple[int, ...]) -> bool:
        """Look for a failure, in the thread that watches; after one, abort, which ends the kernels that wait."""
        if gone:
            self._fail(functools.partial(self._processes.error, gone))
        else:
            self._ask()
        if self._failure is None:
            return False
        self._give_back(self._binding.comm_abort, _GRACE_S, 0.0)
        return True

    def _ask(self) -> None:
        """Take note of an error that NCCL has noticed by itself, such as a network's."""
        with self._lock:
            if self._given_back:
                return
            code = int(self._binding.comm_get_async_error(self.communicator))
        if code not in _FINE:
            text = f"NCCL: {self._binding.get_error_string(code)}{self._details()}"
            self._fail(functools.partial(comm.CommError, text))

    def _details(self) -> str:
        """NCCL's last words, which it keeps for the whole process, in parentheses; "" where it has none."""
        with self._lock:
            return "" if self._given_back else _last_words(self._binding, self.communicator)

    def _fail(self, failure: Callable[[], comm.CommError]) -> None:
        """Refuse every later call with this, unless there is a reason already."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
                self.launch = functools.partial(_refuse, failure)

    def _give_back(self, end: Callable[[Any], object], after_s: float, wait_s: float) -> None:
        """End the communicator, once, in a thread: NCCL waits for its kernels, and for graphs that recorded them."""
        with self._lock:
            if self._given_back:
                return
            self._given_back = True
        thread = threading.Thread(
            target=_end, args=(end, self.communicator, after_s), name="comm-core nccl: end", daemon=True
        )
        thread.start()
        thread.join(wait_s)
        if wait_s and thread.is_alive():
            _log.warning("NCCL keeps a communicator's memory until the CUDA graphs that recorded its calls are gone")


def connect(
    binding: Any, stream_of: Callable[[int], int], topology: comm.Topology, context: comm.GroupContext
) -> Session:
    """Make the group's communicator. Collective.

    Args:
        binding: nccl4py's low-level module.
        stream_of: tells a device's current stream.
        topology: the group.
        context: the same, and this rank in it.

    Raises:
        CommTimeoutError: a peer has ended.
        CommError: NCCL can't; with its words.
    """
    identity = bytes(binding.get_unique_id()).hex() if context.rank == 0 else ""
    introduced = context.control.all_gather({"id": identity, **peers.introduce()})
    processes = peers.open_processes(topology, context.rank, context.global_ranks, introduced)
    try:
        communicator = _communicator(binding, bytearray.fromhex(introduced[0]["id"]), context, processes)
    except BaseException:
        processes.close()
        raise
    return Session(binding, communicator, context.device, stream_of, processes)


def _communicator(binding: Any, identity: bytearray, context: comm.GroupContext, processes: peers.Processes) -> Any:
    """A blocking communicator, made in a thread, since NCCL waits for ever for a peer that ended meanwhile.

    Not a non-blocking one, which could be aborted: NCCL starts a thread for each of its calls (`ncclGroupEndInternal`
    in its src/group.cc).
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def make() -> None:
        try:
            with torch.cuda.device(context.device) if context.device.type == "cuda" else contextlib.nullcontext():
                communicator = binding.comm_init_rank(context.world_size, identity, context.rank)
        except BaseException as error:  # noqa: BLE001 - a thread's exception reaches nobody unless it is carried over
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(error)
            return
        try:
            future.set_result(communicator)
        except concurrent.futures.InvalidStateError:  # nobody waits any more
            _end(binding.comm_abort, communicator, 0.0)

    threading.Thread(target=make, name="comm-core nccl: init", daemon=True).start()
    while not concurrent.futures.wait([future], _LOOK_S).done:
        gone = processes.ended()
        if gone and future.cancel():
            raise processes.error(gone)
    try:
        return future.result()
    except binding.NCCLError as error:
        raise comm.CommError(f"NCCL: {error}{_last_words(binding, binding.Comm())}") from error


def _last_words(binding: Any, communicator: Any) -> str:
    words = str(binding.get_last_error(communicator)).strip()
    return f" ({words})" if words else ""


def _refuse(failure: Callable[[], comm.CommError], *_: object) -> NoReturn:
    raise failure()


def _end(end: Callable[[Any], object], communicator: Any, after_s: float) -> None:
    time.sleep(after_s)
    try:
        end(communicator)
    except Exception:  # noqa: BLE001 - in a thread of its own, with nobody to tell
        _log.warning("NCCL couldn't end a communicator", exc_info=True)
