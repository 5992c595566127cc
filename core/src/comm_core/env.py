"""Every environment variable that core reads, in one place.

Core reads them when a group negotiates, not at import. The ranks of a group compare all values except host-local ones;
values that differ raise `NegotiationError`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["PREFIX", "Settings"]

PREFIX = "COMM_CORE_"
"""The prefix of every variable's name."""


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError("it names no backend")
    return names


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("it must be above 0 and finite")
    return value


def _nbytes(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("it must not be negative")
    return value


def _folder(text: str) -> str:
    if not Path(text).is_absolute():
        raise ValueError("it must be an absolute path")
    return text


def _field(default: Any, parse: Callable[[str], Any], doc: str, *, local: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "doc": doc, "local": local})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of the variables: the field `x_y` is the variable `COMM_CORE_X_Y`."""

    backends: tuple[str, ...] | None = _field(
        None,
        _names,
        "Comma-separated names of the only backends that are tried, in the whole job. If one of them can't serve a "
        "group, the group warns once and falls back. By default all installed backends are tried.",
    )
    disable: tuple[str, ...] = _field(
        (),
        _names,
        "Comma-separated names of backends that are neither tried nor imported; each process warns once of names that "
        "aren't installed. The terminal fallback, `torch_distributed`, can't be disabled.",
    )
    control_timeout_s: float = _field(
        300.0,
        _positive,
        "Seconds that a rank waits for the others in an exchange: ranks may enter `get_backend` this far apart.",
    )
    connect_timeout_s: float = _field(
        600.0, _positive, "Seconds for a backend's `connect`, builds included, and again for its admission test."
    )
    wait_timeout_s: float = _field(
        300.0,
        _positive,
        "Seconds that an all-reduce waits for a peer before it raises `CommTimeoutError`. The waits inside NCCL, "
        "FlashInfer and `torch.distributed` don't follow it.",
    )
    import_timeout_s: float = _field(60.0, _positive, "Seconds for the import of one plugin.")
    memory_budget_nbytes: int = _field(
        1 << 30,
        _nbytes,
        "Bytes that the sessions of one group may take for their buffers on each rank: of device memory, and on CPUs "
        "of the whole shared segment.",
    )
    cache_dir: str | None = _field(
        None,
        _folder,
        "The absolute path of the cache of compiled code. Its folders are private to the user; core refuses a folder "
        "that another user could write or replace. Host-local: the ranks don't compare it. By default "
        "`$XDG_CACHE_HOME/comm_core`, else `~/.cache/comm_core`.",
        local=True,
    )

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Return the meanings of all variables, by name."""
        return {PREFIX + field.name.upper(): field.metadata["doc"] for field in dataclasses.fields(cls)}

    def shared(self) -> dict[str, Any]:
        """Return the values that the ranks of a group compare: all except host-local ones."""
        fields = (field for field in dataclasses.fields(self) if not field.metadata["local"])
        return {PREFIX + field.name.upper(): getattr(self, field.name) for field in fields}

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from an environment, by default this process's. An empty value counts as unset.

        Raises:
            ValueError: a variable's value can't be read; the text names the variable.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = PREFIX + field.name.upper()
            text = environ.get(name, "").strip()
            if not text:
                continue
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                raise ValueError(f"{name}={text!r} can't be read: {error}") from None
        return cls(**values)

    @classmethod
    def unknown(cls, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """Return the variables with core's prefix that core doesn't read: misspelt ones, and those of plugins."""
        environ = os.environ if environ is None else environ
        known = cls.variables()
        return tuple(sorted(name for name in environ if name.startswith(PREFIX) and name not in known))
