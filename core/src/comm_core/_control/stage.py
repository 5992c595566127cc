"""How the ranks of one group talk around the hot path: through the job's key-value store, never through collectives.

A collective of the user's group is no way to agree on a failure: after one missed deadline a Gloo group is dead, and a
rank that raises early would have its next message taken for this one. In the store every message has a key of its own:

    incarnation / stage / sequence / group rank      what one rank says
    incarnation / stage / sequence / arrived         how many said something
    incarnation / stage / sequence / verdict         how it ended: everybody waits on this key alone

The last rank to arrive gathers what all said and publishes it as the verdict. A rank that fails, or whose deadline
ends, publishes an abort under the same key. Both by `compare_set`, so the first verdict wins, and everybody follows it,
who comes late too. A rank enters exchange n + 1 only with the verdict of n in its hands, so an abort always meets the
exchange that the others are in.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import threading
import time
import zlib
from datetime import timedelta
from typing import Any, final

import torch.distributed as dist

from comm_core._control.deadline import describe
from comm_core._control.store import Control, Store, compare_set
from comm_core.context import Agreement
from comm_core.errors import CommError, CommTimeoutError

__all__ = ["Stage", "StageAbortedError", "StageTimeoutError"]

#: The longest message of one rank, as JSON text in bytes.
MESSAGE_NBYTES = 64 * 1024
# The longest reason that is carried; a traceback's tail fits, a core dump doesn't.
_REASON_CHARS = 4000
# The most that a verdict may unpack to, so that a corrupt one can't take the host's memory: 64 KiB from 4,096 ranks.
_VERDICT_NBYTES = 4096 * MESSAGE_NBYTES


class StageAbortedError(CommError):
    """A stage of the control channel ended by an abort; every rank of the group sees the same one.

    Attributes:
        reason: the words of the rank that aborted it.
        rank: that rank, by group rank.
    """

    def __init__(self, message: str, reason: str, rank: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.rank = rank


class StageTimeoutError(StageAbortedError, CommTimeoutError):
    """A stage ended because ranks were absent at the deadline.

    Attributes:
        ranks: their group ranks.
    """

    def __init__(self, message: str, reason: str, rank: int, ranks: tuple[int, ...]) -> None:
        StageAbortedError.__init__(self, message, reason, rank)
        self.ranks = ranks


@final
class Stage:
    """A Collective step: a sequence of exchanges that ends for all ranks alike. Implements `ControlChannel`.

    As a context manager it is what all ranks do together until the block's end: an exception that leaves the block
    aborts the stage for all of them.

    Args:
        control: this rank's end of the channel.
        name: the same on every rank, and used once in an incarnation.
        timeout_s: the deadline of the whole stage, from now, in seconds; None: each exchange has its own.

    Attributes:
        aborted: what every call in this stage raises; None while nothing failed.
    """

    def __init__(self, control: Control, name: str, timeout_s: float | None = None) -> None:
        self.aborted: StageAbortedError | None = None
        self._control = control
        self._name = name
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._next = 0
        self._entered: str | None = None  # the exchange that a thread of this rank is in
        self._lock = threading.Lock()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and self.aborted is None:
            self.abort(describe(error))

    @property
    def begun(self) -> bool:
        """Whether this rank has entered an exchange."""
        return self._next > 0

    def all_gather(self, value: Any, kind: str = "all_gather") -> list[Any]:
        """Every rank's `value`, by group rank; see `ControlChannel.all_gather`. Kinds that differ abort the stage.

        Raises:
            ValueError, TypeError: `value` isn't JSON or is too long; before anything is sent.
            StageAbortedError: a rank failed; as `StageTimeoutError`, a rank didn't come in time.
            CommError: the store is gone; as `CommTimeoutError`, it doesn't answer.
        """
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        if len(text.encode()) > MESSAGE_NBYTES:
            raise ValueError(f"a message of {len(text.encode())} bytes: the limit is {MESSAGE_NBYTES}")
        with self._lock:
            if self.aborted is not None:
                raise self.aborted
            key = self._key(self._next)
            self._next += 1
            self._entered = key
            done = self._control.leftover
        left_s = self._control.timeout_s if self._deadline is None else max(self._deadline - time.monotonic(), 0)
        exchange = functools.partial(self._exchange, key, f'["{kind}",{text}]', done, left_s)
        verdict = self._control.ask(self._name, exchange, left_s)
        with self._lock:
            self._entered = None
            if "abort" in verdict:
                self._control.note_abort(key)
                self.aborted = self.aborted or self._error(verdict["abort"])
                raise self.aborted
            # Where another thread aborted the stage meanwhile, this rank may be in a later one: `abort` noted the key.
            if self.aborted is None:
                self._control.note_success(key)
        return list(verdict["values"])

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.all_gather(None, "barrier")

    def agree(self, ok: bool, reason: str = "") -> Agreement:
        """Vote; see `ControlChannel.agree`."""
        votes = self.all_gather(None if ok else str(reason)[:_REASON_CHARS], "agree")
        reasons = {rank: why for rank, why in enumerate(votes) if why is not None}
        return Agreement(not reasons, reasons)

    def abort(self, reason: str) -> StageAbortedError:
        """End the stage for all ranks, also while another thread of this rank is in one of its exchanges.

        Returns:
            What this and every other rank's calls in the stage raise: the first abort's, where there were several.
        """
        # Kept until the verdict is known: no thread of this rank begins another exchange, nor raises anything else than
        # the other ranks will.
        with self._lock:
            if self.aborted is None:
                self.aborted = self._post_abort(self._abort(reason[:_REASON_CHARS], self._control.rank))
            return self.aborted

    def peek(self) -> StageAbortedError | None:
        """Read, without waiting, how others have ended this stage; for a rank that has entered no exchange of it."""
        # The first exchange can't succeed without this rank, so that a verdict is an abort, whose keys stay.
        key = f"{self._key(0)}/verdict"
        with contextlib.suppress(CommError):  # without its store a group can't abort anything either
            verdict = self._control.ask(self._name, lambda store: store.get(key) if store.check([key]) else None)
            return None if verdict is None else self._error(_unpack(verdict)["abort"])
        return None

    def awaited(self) -> tuple[int, ...]:
        """The ranks that another thread of this rank waits for in an exchange, by group rank."""
        with self._lock:
            key = self._entered
        if key is None:
            return ()
        ranks = range(self._control.world_size)
        with contextlib.suppress(CommError):  # then nobody can tell
            return self._control.ask(
                self._name, lambda store: tuple(rank for rank in ranks if not store.check([f"{key}/{rank}"]))
            )
        return ()

    def _exchange(self, key: str, text: str, done: str, timeout_s: float, store: Store) -> dict[str, Any]:
        control = self._control
        messages = [f"{key}/{rank}" for rank in range(control.world_size)]
        store.set(messages[control.rank], text)
        if store.add(f"{key}/arrived", 1) < control.world_size:
            return self._await_verdict(key, messages, timeout_s, store)
        kinds, values = zip(*map(json.loads, store.multi_get(messages)), strict=True)
        odd = min(range(len(kinds)), key=lambda rank: kinds.count(kinds[rank]))
        lost = self._abort(f"exchanges don't match: {kinds[odd]} here, not as elsewhere", odd)
        verdict = _publish(key, {"values": values} if len(set(kinds)) == 1 else {"abort": lost}, store)
        if done:
            # Every rank has come here, so every rank has left the exchange before.
            control.delete(done, store)
        return verdict

    def _await_verdict(self, key: str, messages: list[str], timeout_s: float, store: Store) -> dict[str, Any]:
        try:
            # Zero would mean "for ever" to some stores.
            store.wait([f"{key}/verdict"], timedelta(seconds=max(timeout_s, 0.001)))
        except dist.DistNetworkError:
            raise
        except RuntimeError:
            # Not every store has its own error for a wait that ended. Publishing tells whether there is a verdict.
            absent = [rank for rank, message in enumerate(messages) if not store.check([message])]
            who = self._control.label(*absent) if absent else "the rank that came last"
            abort = self._abort(f"{who} didn't come in time", self._control.rank)
            return _publish(key, {"abort": abort | {"absent": absent}}, store)
        return _unpack(store.get(f"{key}/verdict"))

    def _post_abort(self, abort: dict[str, Any]) -> StageAbortedError:
        # The exchange that another thread is in may have succeeded meanwhile. Then the other ranks are bound for the
        # next one, which can't succeed without this rank, and meet the abort there.
        for sequence in range(max(self._next - 1, 0), self._next + 1):
            key = self._key(sequence)
            self._control.note_abort(key)
            try:
                verdict = self._control.ask(self._name, functools.partial(_publish, key, {"abort": abort}))
            except CommError:  # whoever is cut off from the store finds that out alone
                break
            if "abort" in verdict:
                return self._error(verdict["abort"])
        return self._error(abort)

    @staticmethod
    def _abort(reason: str, rank: int) -> dict[str, Any]:
        return {"reason": reason, "rank": rank, "absent": None}

    def _error(self, abort: dict[str, Any]) -> StageAbortedError:
        rank, reason, absent = abort["rank"], abort["reason"], abort["absent"]
        if absent is not None:
            message = f"{self._name}: {reason}, says {self._control.label(rank)}"
            return StageTimeoutError(message, reason, rank, tuple(absent))
        return StageAbortedError(f"{self._name}: {self._control.label(rank)} failed: {reason}", reason, rank)

    def _key(self, sequence: int) -> str:
        return f"{self._control.prefix}/{self._name}/{sequence}"


def _publish(key: str, verdict: dict[str, Any], store: Store) -> dict[str, Any]:
    """Make `verdict` the exchange's, unless it has one; returns the one it has."""
    packed = zlib.compress(json.dumps(verdict, separators=(",", ":")).encode(), 1)
    # As text, since a store's Python binding promises nothing else.
    return _unpack(compare_set(f"{key}/verdict", "", base64.b64encode(packed).decode(), store))


def _unpack(packed: bytes | str) -> dict[str, Any]:
    inflate = zlib.decompressobj()
    text = inflate.decompress(base64.b64decode(packed), _VERDICT_NBYTES)
    if inflate.unconsumed_tail:
        raise CommError(f"a verdict of more than {_VERDICT_NBYTES} bytes: the job's store holds something else")
    return dict(json.loads(text))
