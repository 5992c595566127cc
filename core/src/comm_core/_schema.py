"""Read what plugins, files and other ranks send: printable text of limited size, JSON of the expected form. Pure.

Data from outside passes through this module once, where it comes in. The code behind that place relies on its form.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

__all__ = [
    "MAX_DEPTH",
    "MAX_INT",
    "MAX_NAMES",
    "MalformedError",
    "Reader",
    "anything",
    "boolean",
    "check_bool",
    "check_int",
    "integer",
    "json_nbytes",
    "load_json",
    "mapping_of",
    "optional",
    "printable",
    "record",
    "shorten",
    "text",
    "tuple_of",
    "unique_names",
]

#: The deepest nesting of lists and objects in JSON from outside: core's own messages have less than ten levels.
MAX_DEPTH = 64
#: The largest integer from outside: that of torch's sizes.
MAX_INT = 2**63 - 1
#: The most names in one field of a range, and the longest of them in characters: far above those of torch.
MAX_NAMES = 16
_NAME_CHARS = 64

#: Checks a value that came from JSON and returns it in its final form; the second argument is its place, for errors.
Reader: TypeAlias = Callable[[Any, str], Any]

_WHITESPACE = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
# Control characters, half a surrogate pair, and the marks that change the direction of the text around them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class MalformedError(ValueError):
    """Data from outside doesn't have the expected form; the text says where, and what it has instead."""


def printable(text: str) -> str:
    """Return the text on one line, with "?" for each character that a terminal would obey or can't show.

    Ordinary Unicode stays. Without this, a name or a reason from a plugin or another rank could send escape sequences
    to the terminal, forge lines of a log, or fail to be encoded.
    """
    return _UNPRINTABLE.sub("?", _WHITESPACE.sub(" ", text))


def shorten(text: str, nbytes: int) -> str:
    """Return the text; if it takes more than `nbytes` bytes as JSON, its beginning with "..."."""
    if json_nbytes(text) - 2 <= nbytes:
        return text
    kept, left = "", nbytes - 3
    for char in text:
        left -= json_nbytes(char) - 2
        if left < 0:
            break
        kept += char
    return f"{kept}..."


def json_nbytes(value: Any) -> int:
    """Return the size of a value as JSON in a message, in bytes."""
    return len(json.dumps(value, separators=(",", ":")))


def load_json(data: str | bytes, nbytes: int | None = None, *, depth: int = MAX_DEPTH) -> Any:
    """Parse JSON from outside.

    Args:
        data: the JSON text.
        nbytes: the longest text to accept, in bytes; None: any.
        depth: the deepest nesting of lists and objects to accept.

    Raises:
        MalformedError: it is longer, isn't JSON, is nested too deeply, or has a number that JSON or Python lacks.
    """
    if nbytes is not None and len(data) > nbytes:
        raise MalformedError(f"it has {len(data)} bytes; the limit is {nbytes}")
    try:
        value = json.loads(data, parse_constant=_refuse_number, parse_float=_finite)
    except RecursionError:
        raise MalformedError(f"it is nested more than {depth} levels deep") from None
    except ValueError as error:
        raise MalformedError(f"it isn't JSON: {shorten(printable(str(error)), 200)}") from None
    _check_depth(value, depth)
    return value


def _refuse_number(name: str) -> float:
    raise ValueError(f"{name} isn't a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


def _check_depth(value: Any, depth: int) -> None:
    """Check the nesting level by level, without recursion."""
    level = [value]
    for _ in range(depth + 1):
        containers = [item for item in level if isinstance(item, (dict, list)) and item]
        if not containers:
            return
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    raise MalformedError(f"it is nested more than {depth} levels deep")


def anything(value: Any, _where: str) -> Any:
    """Read any value."""
    return value


def unique_names(values: Iterable[Any] | None, prefix: str = "") -> tuple[str, ...] | None:
    """Return each name once, without `prefix`; None for None.

    Raises:
        TypeError, ValueError: it is one string, or there are too many names, too long ones or unprintable ones.
    """
    if values is None:
        return None
    if isinstance(values, str):
        raise TypeError(f"expected a sequence of names, got the string {values!r}")
    names = tuple(dict.fromkeys(str(value).removeprefix(prefix) for value in values))
    if len(names) > MAX_NAMES or any(len(name) > _NAME_CHARS or name != printable(name) for name in names):
        raise ValueError(f"expected at most {MAX_NAMES} printable names of at most {_NAME_CHARS} characters")
    return names


def check_int(field: str, value: object, lowest: int) -> None:
    """Raise `TypeError` or `ValueError` unless a field's value is an integer from `lowest` to `MAX_INT`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field}={value!r} isn't an integer")
    if value < lowest:
        raise ValueError(f"{field}={value} is below {lowest}")
    if value > MAX_INT:
        raise ValueError(f"{field} is above {MAX_INT}")


def check_bool(field: str, value: object) -> None:
    """Raise `TypeError` unless a field's value is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"{field}={value!r} isn't True or False")


def text(value: Any, where: str) -> str:
    """Read a text and make it printable."""
    if not isinstance(value, str):
        raise _wrong_kind(value, where, "a text")
    return printable(value)


def boolean(value: Any, where: str) -> bool:
    """Read a boolean."""
    if not isinstance(value, bool):
        raise _wrong_kind(value, where, "true or false")
    return value


def integer(lowest: int = 0, highest: int = MAX_INT) -> Reader:
    """Return the reader of an integer within these bounds."""

    def read(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong_kind(value, where, "an integer")
        if not lowest <= value <= highest:
            raise MalformedError(f"{where} is outside {lowest} to {highest}")
        return value

    return read


def optional(reader: Reader) -> Reader:
    """Return the reader of null, or of what `reader` reads."""
    return lambda value, where: None if value is None else reader(value, where)


def tuple_of(reader: Reader, lowest: int = 0, highest: int | None = None) -> Reader:
    """Return the reader of a list with a number of items within these bounds; it returns a tuple."""

    def read(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise _wrong_kind(value, where, "a list")
        if len(value) < lowest or (highest is not None and len(value) > highest):
            bounds = str(lowest) if lowest == highest else f"{lowest} to {'any number' if highest is None else highest}"
            raise MalformedError(f"{where} has {len(value)} items instead of {bounds}")
        return tuple(reader(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read


def mapping_of(reader: Reader) -> Reader:
    """Return the reader of an object with any names; it returns a dict."""

    def read(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _wrong_kind(value, where, "an object")
        names = {name: shorten(text(name, f"a name in {where}"), 100) for name in value}
        return {printable(name): reader(value[name], f"{where}.{shown}") for name, shown in names.items()}

    return read


def record(cls: Callable[..., Any], *, strict: bool = False, **readers: Reader) -> Reader:
    """Return the reader of a dataclass.

    Args:
        cls: the dataclass; fields without a default must be there.
        strict: whether an unknown field is an error. Else it is ignored: another release may have written it.
        readers: the reader of each field, by its name.
    """
    required = {
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise _wrong_kind(value, where, "an object")
        unknown = next((name for name in value if name not in readers), None) if strict else None
        if unknown is not None:
            raise MalformedError(f"{where} has an unknown field {shorten(printable(repr(unknown)), 100)}")
        missing = sorted(required - value.keys())
        if missing:
            raise MalformedError(f"{where} lacks {', '.join(missing)}")
        fields = {name: reader(value[name], f"{where}.{name}") for name, reader in readers.items() if name in value}
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:  # from the dataclass's own checks
            raise MalformedError(f"{where}: {shorten(printable(str(error)), 200)}") from error

    return read


def _wrong_kind(value: Any, where: str, expected: str) -> MalformedError:
    kinds = {bool: "true or false", int: "an integer", float: "a fraction", str: "a text", list: "a list"}
    found = "null" if value is None else kinds.get(type(value), "an object")
    return MalformedError(f"{where} is {found} instead of {expected}")
