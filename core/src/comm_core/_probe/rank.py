"""What a rank learns about itself, for its group's `Topology`: local, and never raising.

What can't be learnt is left out, with the reason in `RankInfo.unknown`.
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
from comm_core._probe.attempt import attempt
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
    """Where the probe looks.

    Attributes:
        torch: imports torch.
        nvml: imports NVML's binding, `pynvml`.
        environ: the environment.
        proc: where procfs is mounted.
        shm: where POSIX shared memory lives.
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
        facts: what each plugin's `probe()` returned, by backend name.
        sources: where to look; None: this process and host.
    """
    sources = sources or Sources()
    unknown: dict[str, str] = {}
    host = probe_host(sources, unknown)
    versions = probe_versions(sources, unknown)
    found: Device | None = None
    allocator: str | None = None
    if device is not None and device.type != "cpu":
        looked = attempt(unknown, "device", lambda: _probe_device(device, sources, unknown))
        if looked is not None:
            found, driver = looked
            versions |= {"driver": driver} if driver else {}
        allocator = attempt(unknown, "allocator", lambda: _allocator(sources, unknown))
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
    """This process's host; `unknown` gains the reason of each part that can't be read."""
    return host.probe_host(unknown, proc=sources.proc, shm=sources.shm)


def probe_versions(sources: Sources, unknown: dict[str, str]) -> dict[str, str]:
    """Versions of "comm_core", "python", "torch", and of "cuda" and "nccl" where torch was built with them."""
    versions = {"comm_core": __version__, "python": platform.python_version()}
    torch = attempt(unknown, "versions.torch", sources.torch)
    if torch is None:
        return versions
    release = attempt(unknown, "versions.torch", lambda: str(torch.__version__))
    cuda = attempt(unknown, "versions.cuda", lambda: torch.version.cuda)
    if release:
        versions["torch"] = release
    if cuda:
        versions["cuda"] = str(cuda)
        nccl = attempt(unknown, "versions.nccl", lambda: ".".join(map(str, torch.cuda.nccl.version())))
        versions |= {"nccl": nccl} if nccl else {}
    return versions


def probe_devices(sources: Sources, unknown: dict[str, str]) -> tuple[tuple[Device, ...], str | None]:
    """Every GPU that NVML sees, and the driver's version; without NVML none, and `unknown["nvml"]` says why."""

    def ask() -> tuple[tuple[Device, ...], str | None]:
        binding = sources.nvml()
        with nvml.opened(binding):
            driver = attempt(unknown, "versions.driver", binding.nvmlSystemGetDriverVersion)
            return nvml.list_devices(binding, unknown), driver

    return attempt(unknown, "nvml", ask) or ((), None)


def _probe_device(device: torch.device, sources: Sources, unknown: dict[str, str]) -> tuple[Device, str | None]:
    if device.type != "cuda":
        raise NotImplementedError(f"devices of type {device.type!r} aren't probed")
    cuda = sources.torch().cuda
    index = cuda.current_device() if device.index is None else device.index
    properties = cuda.get_device_properties(index)
    bare_uuid = _bare_uuid(properties)
    visible = sources.environ.get("CUDA_VISIBLE_DEVICES", "")

    def ask_nvml() -> nvml.View:
        binding = sources.nvml()
        with nvml.opened(binding):
            return nvml.look(binding, bare_uuid, visible, unknown)

    view = attempt(unknown, "device.links", ask_nvml)
    if view is None:
        links = attempt(unknown, "device.links", lambda: _peer_access(cuda, index)) or {}
        own_uuid = nvml.named_instance(visible) or f"GPU-{bare_uuid}"
        view = nvml.View(uuid=own_uuid, driver=None, fabric=None, links=links)
    found = Device(
        type=device.type,
        uuid=view.uuid,
        name=str(properties.name),
        capability=(int(properties.major), int(properties.minor)),
        memory_nbytes=int(properties.total_memory),
        fabric=view.fabric,
        links=view.links,
    )
    return found, view.driver


def _bare_uuid(properties: Any) -> str:
    return str(properties.uuid).removeprefix("GPU-").removeprefix("MIG-")


def _peer_access(cuda: Any, index: int) -> dict[str, Link]:
    """What CUDA itself says about the way to each other visible device, without NVML."""
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
    # The environment says only how the process began: `expandable_segments` can be switched while it runs, and what was
    # allocated meanwhile stays. torch has no public question for that; its snapshot has answered it since before 2.8.
    expandable = attempt(unknown, "allocator", lambda: _has_expandable_segments(cuda.memory._snapshot()))  # noqa: SLF001
    if expandable is None:
        expandable = _asks_for_expandable_segments(sources.environ)
    return "expandable_segments" if expandable else backend


def _has_expandable_segments(snapshot: Mapping[str, Any]) -> bool:
    settings = snapshot["allocator_settings"]["expandable_segments"]
    return bool(settings) or any(segment.get("is_expandable") for segment in snapshot["segments"])


def _asks_for_expandable_segments(environ: Mapping[str, str]) -> bool:
    # Releases of torch differ in which of the two wins.
    values = (environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in value.replace(" ", "").lower() for value in values)
