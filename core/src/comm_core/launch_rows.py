"""Rows of a backend's table by size: which algorithm and launch shape serve which messages. Pure.

A backend with several algorithms derives a row of its own from `LaunchRow`. A row has a text, for people, for the hooks
`variants` and `use_variants`, and for an option that forces one row; and numbers, for native code and facts of `probe`:

```python
@dataclasses.dataclass(frozen=True)
class Row(LaunchRow):
    codes = {"ring": 0, "tree": 1}
    threads: int = 256
    blocks: int = 64

row = Row.parse("tree:threads=128")
str(row)       # "tree:threads=128,blocks=64"
row.numbers()  # (0, 1, 128, 64)
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MAX_NUMBER", "LaunchRow", "flat", "read_option"]

MAX_NUMBER = 1 << 16
"""Larger numbers in a row's text count as this one, which is above any launch shape."""
_Row = TypeVar("_Row", bound="LaunchRow")


@dataclasses.dataclass(frozen=True)
class LaunchRow:
    """The algorithm that serves messages up to a size; a derived class adds the launch shape's numbers, with defaults.

    Attributes:
        codes: by algorithm, the number that stands for it; set in the class.
        up_to_nbytes: the largest message, in bytes.
        algorithm: one of `codes`.
    """

    codes: ClassVar[Mapping[str, int]] = {}
    up_to_nbytes: int
    algorithm: str

    def numbers(self) -> tuple[int, ...]:
        """Return the fields in their order, with the algorithm's code in place of its name."""
        up_to_nbytes, algorithm, *shape = dataclasses.astuple(self)
        return (up_to_nbytes, self.codes[algorithm], *shape)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Self:
        """Return the row that has these `numbers()`."""
        up_to_nbytes, code, *shape = numbers
        return cls(up_to_nbytes, {number: name for name, number in cls.codes.items()}[code], *shape)

    def __str__(self) -> str:
        _, algorithm, *shape = dataclasses.astuple(self)
        pairs = zip(self._shape_names(), shape, strict=True)
        return f"{algorithm}:" + ",".join(f"{name}={number}" for name, number in pairs)

    @classmethod
    def parse(cls, text: str, algorithms: Collection[str] | None = None) -> Self:
        """Read "algorithm" or "algorithm:name=number,..."; numbers that are left out have their defaults.

        Args:
            text: the row's text.
            algorithms: those that the text may name; None: all.

        Returns:
            A row with `up_to_nbytes` 0. Whether a kernel has that shape is for the backend to say.

        Raises:
            ValueError: the algorithm or a name isn't one of these, or a number can't be read.
        """
        algorithm, _, shape = text.partition(":")
        known = cls.codes if algorithms is None else algorithms
        if algorithm not in known:
            raise ValueError(f"{text!r}: {algorithm!r} isn't one of {', '.join(known)}")
        names = cls._shape_names()
        numbers: dict[str, int] = {}
        for item in filter(None, shape.split(",")):
            name, _, number = item.partition("=")
            if name not in names or not number.isdecimal():
                listed = ", ".join(f"{name}=" for name in names)
                raise ValueError(f"{text!r}: {item!r} isn't a number for one of {listed}")
            numbers[name] = min(int(number), MAX_NUMBER)
        return cls(0, algorithm, **numbers)

    @classmethod
    def _shape_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)][2:]


def flat(rows: Iterable[LaunchRow]) -> list[int]:
    """Return the rows' numbers one after another."""
    return [number for row in rows for number in row.numbers()]


def read_option(name: str, environ: Mapping[str, str], parse: Callable[[str], _Row]) -> _Row | None:
    """Return the row that a variable forces; None if it is unset or empty.

    Args:
        name: the variable's name.
        environ: the environment, such as `os.environ`.
        parse: returns a text's row.

    Raises:
        ValueError: `parse` raised it; the variable's name precedes the message.
    """
    text = environ.get(name, "").strip()
    try:
        return parse(text) if text else None
    except ValueError as error:
        raise ValueError(f"{name}={error}") from None
