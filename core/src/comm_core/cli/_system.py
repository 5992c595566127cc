"""What `comm-core doctor` says of the machine beside its GPUs: processor, compilers, packages, crashed processes."""

from __future__ import annotations

import ipaddress
import os
import platform
import shlex
import socket
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from comm_core._plugins.crashes import earlier_crashes
from comm_core._probe.attempt import try_query
from comm_core.cli._report import Problem

__all__ = ["describe_crashes", "describe_system"]

#: Packages of backends and serving engines whose versions matter.
_PACKAGES = (
    *("apache-tvm-ffi", "cuda-bindings", "flashinfer-python", "nccl4py", "numpy", "nvidia-ml-py", "nvidia-nccl-cu12"),
    *("nvidia-nccl-cu13", "pluggy", "sglang", "transformers", "triton", "vllm"),
)


def describe_system(environ: Mapping[str, str], unknown: dict[str, str]) -> dict[str, str]:
    """Return facts in words, by name; put the reason for each that is missing into `unknown`."""
    queries = {
        "os": platform.platform,
        "processor": _processor,
        "gcc": lambda: _ask_torch("get_gcc_version"),
        "nvcc": lambda: _ask_torch("get_running_cuda_version"),
        "Gloo's interface": lambda: _gloo_interface(environ),
        "packages": _packages,
    }
    found = {name: try_query(unknown, name, query) for name, query in queries.items()}
    return {name: value for name, value in found.items() if value is not None}


def describe_crashes(cache_dir: str | None) -> tuple[Problem, ...]:
    """Return the processes of the last day that ended within a plugin's hook."""
    return tuple(
        Problem(str(crash), f"{crash.remedy}. To forget it: rm {shlex.quote(crash.path)}")
        for crash in earlier_crashes(cache_dir)
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} usable here"


def _ask_torch(query: str) -> str:
    """Return what one of the queries of torch's own report, `python -m torch.utils.collect_env`, finds."""
    from torch.utils import collect_env

    return getattr(collect_env, query)(collect_env.run) or "none"


def _gloo_interface(environ: Mapping[str, str]) -> str:
    """Return the network interface by which ranks reach each other over Gloo, as torch chooses it."""
    if name := environ.get("GLOO_SOCKET_IFNAME"):
        return f"{name}, by GLOO_SOCKET_IFNAME"
    host = socket.gethostname()
    address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    lonely = ", which other hosts can't reach" if ipaddress.ip_address(address).is_loopback else ""
    return f"that of {address}, the address of {host}{lonely}"


def _packages() -> str:
    return ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version_of(name))) or "none"


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
