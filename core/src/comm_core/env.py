"""Every environment variable that core reads, in one place.

Core reads them when a group negotiates, not at import. The ranks of a group compare all values except host-local ones;
values that differ raise `NegotiationError`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from comm_core import _schema
from comm_core.tuning import NO_TUNING, RuleError, Tuning, TuningRule, parse_rules
from comm_core.types import WIRES

__all__ = [
    "MAX_TIMEOUT_S",
    "PREFIX",
    "Settings",
    "UnreadableSettingError",
    "check_names",
    "check_timeout_s",
    "check_wire",
]

PREFIX = "COMM_CORE_"
"""The prefix of every variable's name."""
MAX_TIMEOUT_S = 30 * 24 * 3600.0
"""The longest timeout, in seconds: 30 days. Threads and stores can't wait for some larger numbers."""
# The longest value of a variable, and of the names in one argument, in bytes: the ranks exchange them in one message.
_VALUE_NBYTES = 2048


class UnreadableSettingError(ValueError):
    """A variable's value can't be read; the text says which and why.

    Attributes:
        excerpt: the lines that show the fault's place in the value, with a mark below it; none for a simple value.
    """

    def __init__(self, text: str, excerpt: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.excerpt = excerpt


def check_timeout_s(value: float) -> float:
    """Check a timeout from the environment or from an argument, and return it.

    Args:
        value: the timeout, in seconds.

    Raises:
        TypeError: it isn't a number.
        ValueError: it isn't above 0, or is above `MAX_TIMEOUT_S`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number of seconds, got {_schema.shorten(repr(value), 100)}")
    if not 0 < value <= MAX_TIMEOUT_S:
        raise ValueError(f"it must be above 0 and at most {MAX_TIMEOUT_S:.0f} seconds, which are 30 days")
    return value


def check_wire(name: str) -> str:
    """Check the name of a quantised wire from the environment or from an argument, and return it.

    Raises:
        ValueError: it isn't "", for none, or one of `comm_core.types.WIRES`.
    """
    if name not in ("", *WIRES):
        raise ValueError(f"wire={name!r}: expected {', '.join(map(repr, WIRES))}, or '' for none")
    return name


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Check names of backends from the environment or from an argument; return each once, sorted: order has no meaning.

    Raises:
        TypeError: a name isn't a string.
        ValueError: a name has characters that can't be printed, or the names are too long to be exchanged.
    """
    unique = set(names)
    if not all(isinstance(name, str) for name in unique):
        raise TypeError("expected names of backends, as strings")
    if any(name != _schema.printable(name) for name in unique):
        raise ValueError("a name has characters that can't be printed")
    nbytes = len(",".join(unique).encode())
    if nbytes > _VALUE_NBYTES:
        raise ValueError(f"the names have {nbytes} bytes; the limit is {_VALUE_NBYTES}")
    return tuple(sorted(unique))


def _names(text: str) -> tuple[str, ...]:
    names = check_names(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("it names no backend")
    return names


def _seconds(text: str) -> float:
    return check_timeout_s(float(text))


def _boolean(text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower())
    if value is None:
        raise ValueError("expected 1, true or yes; or 0, false or no")
    return value


def _nbytes(text: str) -> int:
    value = int(text)
    if not 0 <= value <= _schema.MAX_INT:
        raise ValueError("it must be at least 0 and below 2**63")
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
    plugins: tuple[str, ...] | None = _field(
        None,
        _names,
        "Comma-separated names of installed backends: only their code is imported, also by `comm-core doctor` and for "
        "`get_backend(backends=...)`; all others are listed and blocked. By default all may be imported.",
    )
    control_timeout_s: float = _field(
        300.0,
        _seconds,
        "Seconds that a rank waits for the others in an exchange: ranks may enter `get_backend` this far apart.",
    )
    connect_timeout_s: float = _field(
        600.0, _seconds, "Seconds for a backend's `connect`, builds included, and again for its admission test."
    )
    wait_timeout_s: float = _field(
        300.0,
        _seconds,
        "Seconds that an all-reduce waits for a peer before it raises `CommTimeoutError`. The waits inside NCCL, "
        "FlashInfer and `torch.distributed` don't follow it.",
    )
    import_timeout_s: float = _field(60.0, _seconds, "Seconds for the import of one plugin.")
    memory_budget_nbytes: int = _field(
        1 << 30,
        _nbytes,
        "Bytes that the sessions of one group may take for their buffers on each rank: of device memory, and on CPUs "
        "of the whole shared segment.",
    )
    deterministic: bool = _field(
        False,
        _boolean,
        "1, true or yes: every group is deterministic, as by `get_backend(deterministic=True)`: the bits of a result "
        "depend on the inputs alone. By default off.",
    )
    wire: str = _field(
        "",
        check_wire,
        "`fp8`: large sums of half-precision tensors travel [quantised](wire.md), in every group, as by "
        '`get_backend(wire="fp8")`. By default none.',
    )
    tune: tuple[TuningRule, ...] | None = _field(
        None,
        parse_rules,
        "Comma-separated [rules](tuning.md) that override the backends' priorities for some messages, such as "
        "`nccl:all_reduce:4M-inf:graph:inf`; `none`: no rules at all, and no tuned table. By default the table that "
        "`comm-core tune` wrote for groups of this kind, if there is one.",
    )
    debug: bool = _field(
        False,
        _boolean,
        "1, true or yes: the ranks compare each call's operation, shape, dtype and number before it runs, and an error "
        "names the ranks that differ. Slow; for finding mistakes. Also on with `TORCH_DISTRIBUTED_DEBUG=DETAIL`, "
        "unless it is set to 0, false or no. By default off.",
    )
    profile: bool = _field(
        False,
        _boolean,
        "1, true or yes: each call of a backend runs within a range that names the operation, the backend, the bytes "
        "and the group, for torch's profiler, and on GPUs for NVTX. Takes some microseconds a call; off, it takes "
        "nothing. Host-local: the ranks don't compare it. By default off.",
        local=True,
    )
    cache_dir: str | None = _field(
        None,
        _folder,
        "The absolute path of the cache: compiled code, tuned tables, and the hooks that running processes are in. Its "
        "folders are private to the user; core refuses a folder that another user could write or replace. Host-local: "
        "the ranks don't compare it. By default `$XDG_CACHE_HOME/comm_core`, else `~/.cache/comm_core`.",
        local=True,
    )

    @property
    def tuning(self) -> Tuning:
        """The rules of `COMM_CORE_TUNE`."""
        return Tuning(self.tune, f"{PREFIX}TUNE") if self.tune else NO_TUNING

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Return the meanings of all variables, by name."""
        return {PREFIX + field.name.upper(): field.metadata["doc"] for field in dataclasses.fields(cls)}

    def shared(self) -> dict[str, Any]:
        """Return the values that the ranks of a group compare: all except host-local ones."""
        fields = (field for field in dataclasses.fields(self) if not field.metadata["local"])
        values = {PREFIX + field.name.upper(): getattr(self, field.name) for field in fields}
        if self.tune is not None:
            values[f"{PREFIX}TUNE"] = tuple(map(str, self.tune))
        return values

    def may_import(self, name: str) -> bool:
        """Return whether the variables allow to import the plugin of the backend `name`."""
        return name not in self.disable and (self.plugins is None or name in self.plugins)

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from an environment, by default this process's. An empty value counts as unset.

        Raises:
            UnreadableSettingError: a variable's value can't be read; the text names the variable.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = PREFIX + field.name.upper()
            text = environ.get(name, "").strip()
            if not text:
                continue
            try:
                # An environment's undecodable bytes come as halves of surrogate pairs.
                nbytes = len(text.encode(errors="surrogatepass"))
                if nbytes > _VALUE_NBYTES:
                    raise ValueError(f"it has {nbytes} bytes; the limit is {_VALUE_NBYTES}")
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                value, reason = _schema.shorten(repr(text), 100), _schema.shorten(str(error), 200)
                excerpt = error.excerpt if isinstance(error, RuleError) else ()
                raise UnreadableSettingError(f"{name}={value} can't be read: {reason}", excerpt) from None
        if environ.get("TORCH_DISTRIBUTED_DEBUG", "").strip().upper() == "DETAIL":
            values.setdefault("debug", True)
        return cls(**values)

    @classmethod
    def unknown(cls, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """Return the variables with core's prefix that core doesn't read: misspelt ones, and those of plugins."""
        environ = os.environ if environ is None else environ
        known = cls.variables()
        return tuple(sorted(name for name in environ if name.startswith(PREFIX) and name not in known))
