"""Read the messages that the ranks of a group exchange; a message that can't be read names its rank. Pure.

Every rank reads the same messages by the same function, so that a malformed one raises on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from comm_core import _schema
from comm_core._plan.checks import describe_differences
from comm_core._plan.decide import Evidence, encode_answer
from comm_core.errors import NegotiationError
from comm_core.types import MAX_RANGES, Available, Range

__all__ = [
    "parse_answers",
    "parse_each",
    "parse_evidence",
    "read_failures",
    "read_memory",
    "read_pair",
    "read_prepared",
    "read_recorded",
    "read_shapes",
    "read_table_vote",
]


def parse_each(values: Sequence[Any], read: _schema.Reader, label: Callable[[int], str]) -> list[Any]:
    """Read each rank's message.

    Args:
        values: the messages by group rank.
        read: the reader of one message.
        label: returns the name of a group rank for texts.

    Raises:
        NegotiationError: some can't be read; the text names their ranks.
    """
    results = [_try_read(value, read) for value in values]
    failures = {rank: str(result) for rank, result in enumerate(results) if isinstance(result, _schema.MalformedError)}
    if failures:
        names = ", ".join(label(rank) for rank in list(failures)[:8])
        raise NegotiationError(
            f"{names}{' and more' if len(failures) > 8 else ''} sent a message that can't be read: "
            f"{next(iter(failures.values()))}. All ranks give up. Install the same comm-core on every rank, and let no "
            "other software write to the keys comm_core/... of the job's store"
        )
    return results


def _try_read(value: Any, read: _schema.Reader) -> Any:
    """Return what `read` returns, or the error that it raises."""
    try:
        return read(value, "message")
    except _schema.MalformedError as error:
        return error


def parse_evidence(values: Sequence[Any], label: Callable[[int], str]) -> list[Evidence]:
    """Read each rank's evidence, and before that only the release that wrote it: another one may have other fields.

    Args:
        values: what `Evidence.to_json` returned on each group rank.
        label: returns the name of a group rank for texts.

    Raises:
        NegotiationError: the ranks have different releases of comm-core, or some evidence can't be read.
    """
    releases = parse_each(values, _read_release, label)
    if any(release != releases[0] for release in releases):
        raise NegotiationError(
            f"comm-core differs between the ranks: {describe_differences(releases)}. The negotiation fails, because "
            "two releases may decide differently. Install the same release on every rank"
        )
    return parse_each(values, lambda value, _where: Evidence.from_json(value), label)


def _read_release(value: Any, where: str) -> str:
    """Read the one field that stays the same in all releases."""
    release = _schema.mapping_of(_schema.anything)(value, where).get("comm_core")
    if release is None:
        raise _schema.MalformedError(f"{where} lacks comm_core, the sender's release")
    return _schema.shorten(_schema.text(release, f"{where}.comm_core"), 64)


def parse_answers(
    values: Sequence[Any], asked: Collection[str], label: Callable[[int], str]
) -> list[dict[str, dict[str, Any]]]:
    """Read each rank's encoded answers of the backends that were asked.

    Raises:
        NegotiationError: some answers can't be read.
    """

    def read(value: Any, where: str) -> dict[str, dict[str, Any]]:
        answers = _schema.mapping_of(_schema.anything)(value, where)
        missing = sorted(set(asked) - answers.keys())
        if missing:
            raise _schema.MalformedError(f"{where} has no answer of {missing[0]}")
        return {name: _read_answer(answers[name], f"{where}.{name}") for name in asked}

    return parse_each(values, read, label)


def _read_answer(value: Any, where: str) -> dict[str, Any]:
    fields = _schema.mapping_of(_schema.anything)(value, where)
    if "reason" in fields:
        return encode_answer(_schema.text(fields["reason"], f"{where}.reason"))
    missing = sorted({"priority", "ranges", "checks_operands", "numerics"} - fields.keys())
    if missing:
        raise _schema.MalformedError(f"{where} lacks {', '.join(missing)}")
    answer: Available = _AVAILABLE(fields, where)
    return encode_answer(answer)


def _read_range(value: Any, _where: str) -> Range:
    return Range.from_json(value)


_AVAILABLE = _schema.record(
    Available,
    strict=True,
    priority=_schema.integer(1),
    ranges=_schema.tuple_of(_read_range, 1, MAX_RANGES),
    checks_operands=_schema.boolean,
    numerics=_schema.text,
)


#: Reads the two parts of a rank's answering message: the answers, and the vote on a tuned table.
read_pair = _schema.tuple_of(_schema.anything, 2, 2)
#: Reads a rank's vote on a tuned table: its digest, and the reason against it.
read_table_vote = _schema.tuple_of(_schema.text, 2, 2)
#: Reads a rank's vote on `connect`: the memory that its session takes, in bytes.
read_memory = _schema.integer()
#: Reads the numbers of the admission cases that a rank has recorded; -1 if its capture failed.
read_recorded = _schema.tuple_of(_schema.integer(-1))


def _read_failure(value: Any, where: str) -> tuple[bool, str]:
    is_late, reason = _schema.tuple_of(_schema.anything, 2, 2)(value, where)
    return _schema.boolean(is_late, f"{where}[0]"), _schema.text(reason, f"{where}[1]")


#: Reads a rank's vote on an admission test: by the number of each failed kind of message, whether a time-out came
#: before, and the reason.
read_failures = _schema.mapping_of(_read_failure)


def read_shapes(value: Any, where: str) -> tuple[bool, list[Any]]:
    """Read a rank's arguments of `comm.pre_capture_init`: whether it is prepared for them already; and the three."""
    covered, max_tokens, hidden_size, dtype = _schema.tuple_of(_schema.anything, 4, 4)(value, where)
    size = _schema.integer()
    arguments = [size(max_tokens, f"{where}[1]"), size(hidden_size, f"{where}[2]"), _schema.text(dtype, f"{where}[3]")]
    return _schema.boolean(covered, f"{where}[0]"), arguments


def read_prepared(value: Any, where: str) -> tuple[int, dict[str, Any] | None]:
    """Read a rank's vote on `pre_capture_init`: its session's memory in bytes; and its answer, None for unchanged."""
    memory_nbytes, answer = _schema.tuple_of(_schema.anything, 2, 2)(value, where)
    return read_memory(memory_nbytes, f"{where}[0]"), None if answer is None else _read_answer(answer, f"{where}[1]")
