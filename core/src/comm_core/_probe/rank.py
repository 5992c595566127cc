"""The probe of a rank, for its group's `Topology`: local; it never raises.

A fact that can't be read is left out, with the reason in `RankInfo.unknown`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comm_core._probe import host, nvml
from comm_core._probe.attempt import try_query
from comm_core._version import __version__
from comm_core.topology import Device, Host, Link, RankInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Sources", "probe_devices", "probe_host", "probe_rank", "probe_versions"]


def _import_torch() -> Any:
    return importlib.import_module("torch")


def _import_nvml() -> Any:
    return importlib.import_module("pynvml")


@dataclasses.dataclass(frozen=True)
class Sources:
    """The probe's sources of facts.

    Attributes:
        torch: imports torch.
        nvml: imports NVML's binding, `pynvml`.
        environ: the environment.
        proc: the mount point of procfs.
        shm: the folder of POSIX shared memory.
    """

    torch: Callable[[], Any] = _import_torch
    nvml: Callable[[], Any] = _import_nvml
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)
    proc: Path = host.PROC
    shm: Path = host.SHM


def probe_rank(
    global_rank: int,
    device: torch.device | None,
    *,
    plugins: Mapping[str, str],
    facts: Mapping[str, Any],
    sources: Sources | None = None,
) -> RankInfo:
    """Describe this rank; never raises, and creates no CUDA context beyond that of `device`.

    Args:
        global_rank: its rank in the job.
        device: the accelerator that it uses in the group; None, or one of type "cpu", for a group on CPUs.
        plugins: version of each installed plugin's distribution, by backend name.
        facts: the result of each plugin's `probe()`, by backend name.
        sources: the sources of facts; None: this process and host.
    """
    sources = sources or Sources()
    unknown: dict[str, str] = {}
    host = probe_host(sources, unknown)
    versions = probe_versions(sources, unknown)
    found: Device | None = None
    allocator: str | None = None
    if device is not None and device.type != "cpu":
        result = try_query(unknown, "device", lambda: _probe_device(device, sources, unknown))
        if result is not None:
            found, driver = result
            versions |= {"driver": driver} if driver else {}
        allocator = try_query(unknown, "allocator", lambda: _allocator(sources, unknown))
    return RankInfo(
        global_rank=global_rank,
        host=host,
        device=found,
        allocator=allocator,
        versions=versions,
        plugins=dict(plugins),
        facts=dict(facts),
        unknown=unknown,
    )


def probe_host(sources: Sources, unknown: dict[str, str]) -> Host:
    """Describe this process's host; `unknown` gains the reason of each part that can't be read."""
    return host.probe_host(unknown, proc=sources.proc, shm=sources.shm)


def probe_versions(sources: Sources, unknown: dict[str, str]) -> dict[str, str]:
    """Return the versions of "comm_core", "python", "torch", and of "cuda" and "nccl" if torch was built with them."""
    versions = {"comm_core": __version__, "python": platform.python_version()}
    torch = try_query(unknown, "versions.torch", sources.torch)
    if torch is None:
        return versions
    release = try_query(unknown, "versions.torch", lambda: str(torch.__version__))
    cuda = try_query(unknown, "versions.cuda", lambda: torch.version.cuda)
    if release:
        versions["torch"] = release
    if cuda:
        versions["cuda"] = str(cuda)
        nccl = try_query(unknown, "versions.nccl", lambda: ".".join(map(str, torch.cuda.nccl.version())))
        versions |= {"nccl": nccl} if nccl else {}
    return versions


def probe_devices(sources: Sources, unknown: dict[str, str]) -> tuple[tuple[Device, ...], str | None]:
    """Return NVML's GPUs and the driver's version; without NVML none, and the reason in `unknown["nvml"]`."""

    def ask() -> tuple[tuple[Device, ...], str | None]:
        binding = sources.nvml()
        with nvml.initialised(binding):
            driver = try_query(unknown, "versions.driver", binding.nvmlSystemGetDriverVersion)
            return nvml.list_devices(binding, unknown), driver

    return try_query(unknown, "nvml", ask) or ((), None)


def _probe_device(device: torch.device, sources: Sources, unknown: dict[str, str]) -> tuple[Device, str | None]:
    if device.type != "cuda":
        raise NotImplementedError(f"devices of type {device.type!r} aren't probed")
    cuda = sources.torch().cuda
    index = cuda.current_device() if device.index is None else device.index
    properties = cuda.get_device_properties(index)
    bare_uuid = _bare_uuid(properties)
    visible = sources.environ.get("CUDA_VISIBLE_DEVICES", "")

    def ask_nvml() -> nvml.NvmlDevice:
        binding = sources.nvml()
        with nvml.initialised(binding):
            return nvml.query_device(binding, bare_uuid, visible, unknown)

    described = try_query(unknown, "device.links", ask_nvml)
    if described is None:
        links = try_query(unknown, "device.links", lambda: _peer_access(cuda, index)) or {}
        own_uuid = nvml.visible_mig_uuid(visible) or f"GPU-{bare_uuid}"
        described = nvml.NvmlDevice(uuid=own_uuid, driver=None, fabric=None, links=links)
    found = Device(
        type=device.type,
        uuid=described.uuid,
        name=str(properties.name),
        capability=(int(properties.major), int(properties.minor)),
        memory_nbytes=int(properties.total_memory),
        fabric=described.fabric,
        links=described.links,
    )
    return found, described.driver


def _bare_uuid(properties: Any) -> str:
    return str(properties.uuid).removeprefix("GPU-").removeprefix("MIG-")


def _peer_access(cuda: Any, index: int) -> dict[str, Link]:
    """Return the links to the other visible devices, as reported by CUDA without NVML."""
    links = {}
    for other in range(cuda.device_count()):
        if other != index:
            allowed = bool(cuda.can_device_access_peer(index, other))
            reason = "NVLinks unknown without NVML" if allowed else "CUDA: no peer access"
            links[f"GPU-{_bare_uuid(cuda.get_device_properties(other))}"] = Link(p2p=allowed, reason=reason)
    return links


def _allocator(sources: Sources, unknown: dict[str, str]) -> str:
    cuda = sources.torch().cuda
    backend = str(cuda.get_allocator_backend())
    if backend != "native":
        return backend
    # The environment has only the initial setting: `expandable_segments` can be switched at run time, and segments
    # allocated meanwhile stay. torch has no public function for that; its snapshot has shown it since before 2.8.
    expandable = try_query(unknown, "allocator", lambda: _has_expandable_segments(cuda.memory._snapshot()))  # noqa: SLF001
    if expandable is None:
        expandable = _configures_expandable_segments(sources.environ)
    return "expandable_segments" if expandable else backend


def _has_expandable_segments(snapshot: Mapping[str, Any]) -> bool:
    settings = snapshot["allocator_settings"]["expandable_segments"]
    return bool(settings) or any(segment.get("is_expandable") for segment in snapshot["segments"])


def _configures_expandable_segments(environ: Mapping[str, str]) -> bool:
    # Releases of torch differ in the precedence of the two.
    values = (environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in value.replace(" ", "").lower() for value in values)
