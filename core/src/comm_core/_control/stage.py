"""The exchanges of one group's ranks outside the hot path: through the job's key-value store, not through collectives.

A collective of the user's group can't agree on a failure: after one missed deadline a Gloo group is dead, and if a rank
raises early, its peers take its next message for this one. In the store every message has a key of its own:

    incarnation / stage / sequence / group rank      the message of one rank
    incarnation / stage / sequence / arrived         the number of messages
    incarnation / stage / sequence / verdict         the outcome: every rank waits for this key
    incarnation / ended / verdict                    the abort of a rank that has left the incarnation

The last rank to arrive gathers all messages and publishes them as the verdict. A rank that fails, or that misses its
deadline, publishes an abort under the same key. Both use `compare_set`, so the first verdict wins, and every rank
follows it, including a late one. A rank enters exchange n + 1 only after it has read the verdict of n, so an abort
always reaches the exchange that the others are in.

A rank that leaves the whole incarnation publishes that: see `end_incarnation`. Each exchange that this rank doesn't
join then ends by the same abort, since the ranks that wait look there too. They poll the store rather than wait in it:
torch's TCP store prints two warnings at the end of each wait, and some stores don't wake their waiters.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import threading
import time
import zlib
from typing import Any, final

from comm_core._control.deadline import describe, polls
from comm_core._control.store import Control, Store, compare_set
from comm_core._schema import MAX_DEPTH, MalformedError, load_json, printable, shorten
from comm_core.context import Agreement
from comm_core.errors import CommError, CommTimeoutError

__all__ = ["MESSAGE_NBYTES", "Stage", "StageAbortedError", "StageTimeoutError", "end_incarnation"]

#: The longest message of one rank, as JSON text in bytes.
MESSAGE_NBYTES = 64 * 1024
# What a message has around its value: the brackets and the kind, in bytes.
_FRAME_NBYTES = 64
# The longest reason, in characters: enough for a traceback's tail, too few for a core dump.
_REASON_CHARS = 4000
# How long after the deadline the verdict of a rank that came just before it may come, in seconds.
_LAST_S = 2.0
# What a read returns where there is no verdict; base64 has no such character.
_NOTHING = "-"
# The limit of an unpacked verdict, so that a corrupt one can't fill the host's memory: 64 KiB from each of 4,096 ranks.
_VERDICT_NBYTES = 4096 * MESSAGE_NBYTES


class StageAbortedError(CommError):
    """A stage of the control channel ended by an abort; every rank of the group sees the same one.

    Attributes:
        reason: the reason that the aborting rank gave.
        rank: the group rank of the aborting rank; None if the store has a verdict that no rank of this group sent.
        is_timeout: whether that rank only waited too long: another rank may have the cause.
        final: whether no later stage of the incarnation can succeed, because a rank has left it.
    """

    def __init__(
        self, message: str, reason: str, rank: int | None, *, is_timeout: bool = False, final: bool = False
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.rank = rank
        self.is_timeout = is_timeout
        self.final = final


class StageTimeoutError(StageAbortedError, CommTimeoutError):
    """A stage ended because ranks were absent at the deadline.

    Attributes:
        ranks: the group ranks of the absent ranks.
    """

    def __init__(self, message: str, reason: str, rank: int, ranks: tuple[int, ...]) -> None:
        StageAbortedError.__init__(self, message, reason, rank, is_timeout=True)
        self.ranks = ranks


@final
class Stage:
    """A Collective step: a sequence of exchanges that ends for all ranks alike. Implements `ControlChannel`.

    As a context manager it lasts until the end of the block; an exception that leaves the block aborts the stage for
    all ranks, and the abort is final unless `abort` came first.

    Args:
        control: this rank's access to the store.
        name: equal on every rank, and used once per incarnation.
        timeout_s: the deadline of the whole stage, from now, in seconds; None: each exchange has its own.

    Attributes:
        aborted: the error that every call in this stage raises; None before an abort.
    """

    def __init__(self, control: Control, name: str, timeout_s: float | None = None) -> None:
        self.aborted: StageAbortedError | None = None
        self._control = control
        self._name = name
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._next = 0
        self._current: str | None = None  # the exchange that a thread of this rank is in
        self._lock = threading.Lock()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and self.aborted is None:
            self._abort_with(_abort(describe(error), self._control.rank, final=True))

    @property
    def begun(self) -> bool:
        """True once this rank has entered an exchange."""
        return self._next > 0

    def all_gather(self, value: Any, kind: str = "all_gather") -> list[Any]:
        """Return the values of all ranks; see `ControlChannel.all_gather`. Kinds that differ abort the stage.

        Raises:
            ValueError, TypeError: `value` isn't JSON or is too long; before anything is sent.
            StageAbortedError: a rank failed; as `StageTimeoutError`, a rank didn't come in time.
            CommError: the store is gone; as `CommTimeoutError`, it doesn't answer.
        """
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        if len(text.encode()) > MESSAGE_NBYTES:
            raise ValueError(f"the message has {len(text.encode())} bytes; the limit is {MESSAGE_NBYTES}")
        with self._lock:
            if self.aborted is not None:
                raise self.aborted
            key = self._key(self._next)
            self._next += 1
            self._current = key
            previous = self._control.last_success
        left_s = self._control.timeout_s if self._deadline is None else max(self._deadline - time.monotonic(), 0)
        exchange = functools.partial(self._exchange, key, f'["{kind}",{text}]', previous, left_s)
        verdict = self._control.call_store(self._name, exchange, left_s)
        if "abort" not in verdict and len(verdict["values"]) != self._control.world_size:
            verdict = _unreadable(f"it has {len(verdict['values'])} values")
        with self._lock:
            self._current = None
            if "abort" in verdict:
                self._control.note_abort(key)
                self.aborted = self.aborted or self._error(verdict["abort"])
                raise self.aborted
            # If another thread aborted the stage meanwhile, this rank may be in a later one, and `abort` noted the key.
            if self.aborted is None:
                self._control.note_success(key)
        return list(verdict["values"])

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        self.all_gather(None, "barrier")

    def agree(self, ok: bool, reason: str = "") -> Agreement:
        """Vote; see `ControlChannel.agree`."""
        if not isinstance(ok, bool):
            raise TypeError(f"agree: expected a bool as ok; got {type(ok).__name__}")
        votes = self.all_gather(None if ok else str(reason)[:_REASON_CHARS], "agree")
        reasons = {rank: printable(str(why)) for rank, why in enumerate(votes) if why is not None}
        return Agreement(not reasons, reasons)

    def abort(self, reason: str, *, is_timeout: bool = False) -> StageAbortedError:
        """Abort the stage for all ranks, even while another thread of this rank is in one of its exchanges.

        Args:
            reason: the reason, for all ranks.
            is_timeout: whether this rank only waited too long.

        Returns:
            The error that every rank's calls in this stage raise: that of the first abort.
        """
        return self._abort_with(_abort(reason, self._control.rank, timeout=is_timeout))

    def _abort_with(self, abort: dict[str, Any]) -> StageAbortedError:
        # Held until the verdict is known: no thread of this rank begins another exchange, or raises another error than
        # the other ranks.
        with self._lock:
            if self.aborted is None:
                self.aborted = self._post_abort(abort)
            return self.aborted

    def peek(self) -> StageAbortedError | None:
        """Return the abort that another rank has posted, without waiting; for a rank that has entered no exchange."""
        # The first exchange can't succeed without this rank, so a verdict is an abort, and an abort's keys stay.
        with contextlib.suppress(CommError):  # without its store a group can't abort anything either
            verdict = self._control.call_store(self._name, functools.partial(_read, self._key(0))) or {}
            return self._error(verdict["abort"]) if "abort" in verdict else None
        return None

    def pending_ranks(self) -> tuple[int, ...]:
        """Return the group ranks that another thread of this rank waits for in an exchange."""
        with self._lock:
            key = self._current
        if key is None:
            return ()
        ranks = range(self._control.world_size)
        with contextlib.suppress(CommError):  # without its store a group can't know
            return self._control.call_store(
                self._name, lambda store: tuple(rank for rank in ranks if not store.check([f"{key}/{rank}"]))
            )
        return ()

    def _exchange(self, key: str, text: str, previous: str, timeout_s: float, store: Store) -> dict[str, Any]:
        control = self._control
        messages = [f"{key}/{rank}" for rank in range(control.world_size)]
        store.set(messages[control.rank], text)
        if store.add(f"{key}/arrived", 1) < control.world_size:
            return self._await_verdict(key, messages, timeout_s, store)
        verdict = _publish(key, self._gather(store.multi_get(messages)), store)
        if previous:
            # Every rank has arrived here, so every rank has left the previous exchange.
            control.delete(previous, store)
        return verdict

    def _gather(self, messages: list[bytes]) -> dict[str, Any]:
        """Return the verdict that follows from the messages of all ranks."""
        kinds, values = [], []
        for rank, message in enumerate(messages):
            try:
                kind, value = _parse_message(message)
            except MalformedError as error:
                return {"abort": _abort(f"its message can't be read: {error}", rank)}
            kinds.append(kind)
            values.append(value)
        if len(set(kinds)) == 1:
            return {"values": values}
        outlier = min(range(len(kinds)), key=lambda rank: kinds.count(kinds[rank]))
        others = ", ".join(sorted(set(kinds) - {kinds[outlier]}))
        return {"abort": _abort(f"exchanges don't match: {kinds[outlier]} here, {others} on other ranks", outlier)}

    def _await_verdict(self, key: str, messages: list[str], timeout_s: float, store: Store) -> dict[str, Any]:
        for number, _ in enumerate(polls(timeout_s)):
            if (verdict := _read(key, store)) is not None:
                return verdict
            # Not every time: the store has to answer all ranks.
            if number % 4 == 0 and (ended := _read_end(self._control, store)) is not None:
                return _publish(key, {"abort": ended}, store)
        absent = [rank for rank, message in enumerate(messages) if not store.check([message])]
        for _ in () if absent else polls(_LAST_S):  # the last one came just now, and publishes
            if (verdict := _read(key, store)) is not None:
                return verdict
        late = self._control.label(*absent) if absent else "the rank that came last"
        abort = _abort(f"{late} didn't come in time", self._control.rank, absent=absent)
        # Publishing shows if there is a verdict already.
        return _publish(key, {"abort": abort}, store)

    def _post_abort(self, abort: dict[str, Any]) -> StageAbortedError:
        # The exchange of another thread may have succeeded meanwhile. Then the other ranks go on to the next one, which
        # can't succeed without this rank, and read the abort there. One that this rank has left is skipped: a nested
        # stage's exchange may have deleted its verdict, so that no rank would read the abort there.
        first = self._next if self._current is None else self._next - 1
        for sequence in range(first, self._next + 1):
            key = self._key(sequence)
            self._control.note_abort(key)
            try:
                verdict = self._control.call_store(self._name, functools.partial(_publish, key, {"abort": abort}))
            except CommError:  # a rank that is cut off from the store finds that out alone
                break
            if "abort" in verdict:
                return self._error(verdict["abort"])
        return self._error(abort)

    def _error(self, abort: dict[str, Any]) -> StageAbortedError:
        rank, reason, absent = abort["rank"], printable(abort["reason"]), abort["absent"]
        known = range(self._control.world_size)
        if rank not in known or not set(absent or ()).issubset(known):
            return StageAbortedError(f"{self._name}: {reason}", reason, None)
        if absent is not None:
            message = f"{self._name}: {reason}, says {self._control.label(rank)}"
            return StageTimeoutError(message, reason, rank, tuple(absent))
        message = f"{self._name}: {self._control.label(rank)} failed: {reason}"
        return StageAbortedError(message, reason, rank, is_timeout=abort["timeout"], final=abort["final"])

    def _key(self, sequence: int) -> str:
        return f"{self._control.prefix}/{self._name}/{sequence}"


def _parse_message(message: bytes) -> tuple[str, Any]:
    """Return the kind and the value of one rank's message.

    Raises:
        MalformedError: it isn't what `Stage.all_gather` sends.
    """
    parsed = load_json(message, MESSAGE_NBYTES + _FRAME_NBYTES)
    if not isinstance(parsed, list) or len(parsed) != 2 or not isinstance(parsed[0], str):
        raise MalformedError("it isn't a list of a kind and a value")
    return shorten(printable(parsed[0]), 60), parsed[1]


def end_incarnation(control: Control, error: BaseException) -> None:
    """Tell the other ranks that this rank leaves the incarnation because of `error`. Local; never raises.

    Every later exchange of the incarnation ends by a final abort with this reason, on all ranks. Exchanges that this
    rank has joined may still succeed.
    """
    key, abort = f"{control.prefix}/ended", _abort(describe(error), control.rank, final=True)
    with contextlib.suppress(CommError):  # a rank that is cut off from the store can tell nothing
        control.call_store("leaving the group", functools.partial(_publish, key, {"abort": abort}))
        control.note_abort(key)


def _read_end(control: Control, store: Store) -> dict[str, Any] | None:
    """Return the abort of the rank that has left the incarnation, if one has."""
    verdict = _read(f"{control.prefix}/ended", store)
    return None if verdict is None else dict(verdict["abort"])


def _abort(
    reason: str, rank: int | None, *, timeout: bool = False, final: bool = False, absent: list[int] | None = None
) -> dict[str, Any]:
    return {"reason": reason[:_REASON_CHARS], "rank": rank, "timeout": timeout, "final": final, "absent": absent}


def _read(key: str, store: Store) -> dict[str, Any] | None:
    """Return the verdict of an exchange, None if it has none. Never waits.

    `get` might, even after `check`: the keys of an aborted exchange are deleted once every rank has left, but a thread
    that outlived its deadline may still read them.
    """
    if not store.check([f"{key}/verdict"]):
        return None
    packed = compare_set(f"{key}/verdict", _NOTHING, _NOTHING, store)
    return None if packed == _NOTHING else _unpack(packed)


def _publish(key: str, verdict: dict[str, Any], store: Store) -> dict[str, Any]:
    """Publish `verdict` unless the exchange has one already; return the exchange's verdict."""
    packed = zlib.compress(json.dumps(verdict, separators=(",", ":")).encode(), 1)
    # As text: the Python bindings of stores promise to carry nothing else.
    return _unpack(compare_set(f"{key}/verdict", "", base64.b64encode(packed).decode(), store))


def _unpack(packed: bytes | str) -> dict[str, Any]:
    """Return a verdict; if it can't be read, an abort without a rank, which is the same on all ranks."""
    try:
        inflate = zlib.decompressobj()
        data = packed.encode() if isinstance(packed, str) else packed
        text = inflate.decompress(base64.b64decode(data, validate=True), _VERDICT_NBYTES)
        if inflate.unconsumed_tail:
            raise MalformedError(f"it has more than {_VERDICT_NBYTES} bytes")
        if not inflate.eof:
            raise MalformedError("it is cut off")
        verdict: dict[str, Any] = load_json(text, depth=MAX_DEPTH + 2)  # the values are within a list and an object
        if not _is_verdict(verdict):
            raise MalformedError("it has neither the values of all ranks nor the reason of an abort")
    except (ValueError, zlib.error) as error:  # MalformedError and base64's error are ValueErrors
        return _unreadable(printable(str(error)))
    return verdict


def _is_verdict(verdict: Any) -> bool:
    if not isinstance(verdict, dict) or "abort" not in verdict:
        return isinstance(verdict, dict) and isinstance(verdict.get("values"), list)
    abort = verdict["abort"]
    if not isinstance(abort, dict) or not isinstance(abort.get("reason"), str) or type(abort.get("rank")) is not int:
        return False
    if type(abort.get("timeout")) is not bool or type(abort.get("final")) is not bool:
        return False
    absent = abort.get("absent", "none")
    return absent is None or (isinstance(absent, list) and all(type(rank) is int for rank in absent))


def _unreadable(reason: str) -> dict[str, Any]:
    text = f"the verdict in the job's store can't be read: {reason}. Other software may use its keys comm_core/..."
    return {"abort": _abort(text, None)}
