"""The entry point of `sglang.srt.plugins`: registers this package's hooks with SGLang.

SGLang calls `register` in every process, and logs what it raises. Only ranks need comm_core, so it isn't imported here.
"""

from __future__ import annotations

import logging
import os
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

__all__ = ["NEWEST", "OLDEST", "describe", "register", "release"]

#: The releases of SGLang that this package is written for.
OLDEST, NEWEST = (0, 5, 12), (0, 5, 23)

# A child of SGLang's logger, so that its settings apply.
_log = logging.getLogger("sglang.comm_sglang")


def register() -> None:
    """Register the hooks of this package. A second call changes nothing, nor does any if COMM_SGLANG=0."""
    if _is_off():
        return
    version = metadata.version("sglang")
    if not _is_supported(version):
        _log.warning(
            "comm-sglang leaves all-reduces to SGLang: SGLang is %s; expected %s. Upgrade comm-sglang, or set "
            "COMM_SGLANG=0",
            version,
            _range(),
        )
        return
    from comm_sglang import hooks

    hooks.register(hooks.GROUPS)


def release() -> tuple[int, ...]:
    """Return the release of the installed SGLang, such as (0, 5, 23)."""
    return Version(metadata.version("sglang")).release


def describe() -> dict[str, Any]:
    """Return the facts that `comm-core doctor` prints; imports nothing of SGLang."""
    try:
        found = {"sglang": metadata.version("sglang")}
    except metadata.PackageNotFoundError:
        found = {}
    unknown = [f"{name} {version}" for name, version in found.items() if not _is_supported(version)]
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    missing = None
    if unknown:
        missing = f"it is written for SGLang {_range()}, and {unknown[0]} is installed"
    elif found and not _is_off() and allowed and "comm" not in allowed:
        missing = f"SGLANG_PLUGINS={','.join(allowed)!r} doesn't name its plugin 'comm'"
    replaces = ["GroupCoordinator.ca_comm", "GroupCoordinator.all_reduce", "flashinfer_allreduce_residual_rmsnorm"]
    return {
        "installed": found,
        "replaces": replaces if found and not missing and not _is_off() else [],
        "off": _is_off(),
        "missing": missing,
    }


def _is_off() -> bool:
    return os.environ.get("COMM_SGLANG", "1").strip() == "0"


def _range() -> str:
    return " to ".join(".".join(map(str, version)) for version in (OLDEST, NEWEST))


def _is_supported(version: str) -> bool:
    try:
        return OLDEST <= Version(version).release[:3] <= NEWEST
    except InvalidVersion:
        return False
