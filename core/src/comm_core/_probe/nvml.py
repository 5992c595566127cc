"""NVML's description of this host's devices, by UUID.

Each function gets `pynvml` as an argument. NVML needs no CUDA context and sees devices that `CUDA_VISIBLE_DEVICES`
hides too, so that a process with one visible device knows its links to the peers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comm_core._probe.attempt import try_query
from comm_core.topology import Device, Link

__all__ = ["NvmlDevice", "initialised", "list_devices", "query_device", "visible_mig_uuid"]

# NVML's numbers. pynvml's own NVML_P2P_CAPS_INDEX_READ is the tuple (0,), which no call takes.
_READ, _WRITE, _NVLINK = 0, 1, 2
_P2P_STATUS = (
    "OK",
    "CHIPSET_NOT_SUPPORTED",
    "GPU_NOT_SUPPORTED",
    "IOH_TOPOLOGY_NOT_SUPPORTED",
    "DISABLED_BY_REGKEY",
    "NOT_SUPPORTED",
    "UNKNOWN",
)
#: The maximum of a device's NVLinks, if pynvml doesn't define it; absent links answer with an error.
_MAX_LINKS = 18

#: The remote end of an active NVLink: (PCI domain, bus, device) of a GPU, or None for a switch.
_Remote = tuple[int, int, int] | None


@dataclasses.dataclass(frozen=True)
class NvmlDevice:
    """The facts of one device that only NVML knows; fields as in `comm_core.Device`."""

    uuid: str
    driver: str | None
    fabric: str | None
    links: Mapping[str, Link]


@contextlib.contextmanager
def initialised(nvml: Any) -> Iterator[None]:
    """Keep NVML initialised. NVML counts its users, so other users in this process aren't affected."""
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def query_device(nvml: Any, bare_uuid: str, visible: str, unknown: dict[str, str]) -> NvmlDevice:
    """Query the device with this UUID.

    Args:
        nvml: the module `pynvml`, initialised.
        bare_uuid: the UUID from the CUDA runtime, without "GPU-" or "MIG-".
        visible: the value of `CUDA_VISIBLE_DEVICES`, which names the MIG instance if the runtime gives the UUID of the
            whole GPU.
        unknown: gains the reason of each field that NVML can't fill.

    Raises:
        Exception: NVML can't find the device.
    """
    handle, full_uuid = _find_handle(nvml, bare_uuid, visible)
    if full_uuid.startswith("MIG-"):
        unknown["device.links"] = "a MIG instance has neither NVLink nor peer access"
        links: Mapping[str, Link] = {}
    else:
        links = _links(nvml, handle, full_uuid, unknown)
    return NvmlDevice(
        uuid=full_uuid,
        driver=try_query(unknown, "versions.driver", nvml.nvmlSystemGetDriverVersion),
        fabric=try_query(unknown, "device.fabric", lambda: _fabric(nvml, handle)),
        links=links,
    )


def list_devices(nvml: Any, unknown: dict[str, str]) -> tuple[Device, ...]:
    """Return every GPU that NVML sees, in its order, independent of `CUDA_VISIBLE_DEVICES`.

    Args:
        nvml: the module `pynvml`, initialised.
        unknown: gains the reason of each device or field that NVML can't describe.

    Raises:
        Exception: NVML can't count its devices.
    """
    found = [
        try_query(unknown, f"device {full_uuid}", functools.partial(_describe, nvml, handle, full_uuid, unknown))
        for full_uuid, handle in _handles(nvml, unknown).items()
    ]
    return tuple(device for device in found if device is not None)


def visible_mig_uuid(visible: str) -> str | None:
    """Return the MIG instance that a value of `CUDA_VISIBLE_DEVICES` names, or None."""
    return next((part.strip() for part in visible.split(",") if part.strip().startswith("MIG-")), None)


def _describe(nvml: Any, handle: Any, full_uuid: str, unknown: dict[str, str]) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        type="cuda",
        uuid=full_uuid,
        name=nvml.nvmlDeviceGetName(handle),
        capability=(major, minor),
        memory_nbytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
        fabric=try_query(unknown, f"device {full_uuid}.fabric", lambda: _fabric(nvml, handle)),
        links=_links(nvml, handle, full_uuid, unknown),
    )


def _handles(nvml: Any, unknown: dict[str, str]) -> dict[str, Any]:
    handles = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        # A device that fell off its bus mustn't hide the others.
        handle = try_query(unknown, f"NVML's device {index}", functools.partial(nvml.nvmlDeviceGetHandleByIndex, index))
        if handle is not None:
            handles[nvml.nvmlDeviceGetUUID(handle)] = handle
    return handles


def _find_handle(nvml: Any, bare_uuid: str, visible: str) -> tuple[Any, str]:
    instance = try_query({}, "", lambda: nvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare_uuid}"))
    if instance is not None:
        return instance, f"MIG-{bare_uuid}"
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare_uuid}")
    # A device without MIG answers with an error.
    mode = try_query({}, "", lambda: nvml.nvmlDeviceGetMigMode(handle))
    if not mode or not mode[0]:
        return handle, f"GPU-{bare_uuid}"
    # A process runs on one MIG instance: the one that it names, else the first of its GPU.
    named = visible_mig_uuid(visible)
    if named is None:
        instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)
    else:
        instance = nvml.nvmlDeviceGetHandleByUUID(named)
    return instance, nvml.nvmlDeviceGetUUID(instance)


def _fabric(nvml: Any, handle: Any) -> str | None:
    info = nvml.c_nvmlGpuFabricInfoV_t()
    try:
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_NOT_SUPPORTED:
            return None
        raise
    cluster = bytes(info.clusterUuid)
    if info.state != nvml.NVML_GPU_FABRIC_STATE_COMPLETED or info.status != nvml.NVML_SUCCESS or not any(cluster):
        return None
    return f"{uuid.UUID(bytes=cluster)}/{info.cliqueId}"


def _links(nvml: Any, handle: Any, own_uuid: str, unknown: dict[str, str]) -> dict[str, Link]:
    remotes = functools.cache(lambda: _nvlink_remotes(nvml, handle))
    return {
        peer_uuid: _link(nvml, handle, peer, remotes)
        for peer_uuid, peer in _handles(nvml, unknown).items()
        if peer_uuid != own_uuid
    }


def _link(nvml: Any, handle: Any, peer: Any, remotes: Callable[[], tuple[_Remote, ...] | None]) -> Link:
    (read, read_reason), (write, write_reason), (nvlink, nvlink_reason) = (
        _p2p(nvml, handle, peer, capability) for capability in (_READ, _WRITE, _NVLINK)
    )
    p2p = False if read is False or write is False else True if read and write else None
    nvlinks: int | None = None if nvlink is None else 0
    if nvlink:
        nvlinks, nvlink_reason = _count_nvlinks(remotes(), _pci(nvml.nvmlDeviceGetPciInfo(peer)))
    return Link(nvlinks=nvlinks, p2p=p2p, reason=read_reason or write_reason or nvlink_reason)


def _p2p(nvml: Any, handle: Any, peer: Any, capability: int) -> tuple[bool | None, str]:
    failure: dict[str, str] = {}
    status = try_query(failure, "status", lambda: nvml.nvmlDeviceGetP2PStatus(handle, peer, capability))
    if status is None:
        return None, failure["status"]
    if status == 0:
        return True, ""
    name = _P2P_STATUS[status] if status < len(_P2P_STATUS) else status
    return False, f"NVML: P2P_STATUS_{name}"


def _count_nvlinks(remotes: tuple[_Remote, ...] | None, peer: _Remote) -> tuple[int, str]:
    """Count the active NVLinks to `peer`, after NVML has reported that there are some."""
    if remotes is None:
        return 1, "NVML: the NVLinks can't be counted"
    count = sum(remote is None or remote == peer for remote in remotes)
    return count, "" if count else "NVML: no NVLink is active"


def _nvlink_remotes(nvml: Any, handle: Any) -> tuple[_Remote, ...] | None:
    """Return the remote end of each active NVLink of a device; None if no link reports its state."""
    max_links = getattr(nvml, "NVML_NVLINK_MAX_LINKS", _MAX_LINKS)
    states = [
        try_query({}, "", functools.partial(nvml.nvmlDeviceGetNvLinkState, handle, link)) for link in range(max_links)
    ]
    if all(state is None for state in states):
        return None
    return tuple(_remote(nvml, handle, link) for link, state in enumerate(states) if state)


def _remote(nvml: Any, handle: Any, link: int) -> _Remote:
    kind = try_query({}, "", lambda: nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link))
    if kind != nvml.NVML_NVLINK_DEVICE_TYPE_GPU:
        # A virtual machine may see a switch's links without the switch; the kind is then unknown.
        return None
    return try_query({}, "", lambda: _pci(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link)))


def _pci(info: Any) -> tuple[int, int, int]:
    return (info.domain, info.bus, info.device)
