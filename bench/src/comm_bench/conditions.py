"""The conditions of a measurement: versions, devices, clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comm_core.command import describe

from comm_bench.contenders import Job

if TYPE_CHECKING:
    from comm_core.topology import Topology

__all__ = ["clocks", "machine"]

# From this compute capability on, a kernel may be launched before its predecessor ends (programmatic dependent launch).
_DEPENDENT_LAUNCH = (9, 0)


def machine(topology: Topology) -> dict[str, Any]:
    """Describe the ranks' hosts and devices as JSON, equal on all ranks."""
    first = topology.ranks[0]
    devices = [info.device for info in topology.ranks if info.device is not None]
    found: dict[str, Any] = {
        "ranks": topology.world_size,
        "device_type": topology.device_types[0],
        "hosts": len({info.host.id for info in topology.ranks}),
        "devices": [device.name for device in devices],
        "versions": dict(first.versions),
    }
    if devices:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        link = topology.link(0, topology.world_size - 1)
        found["nvlinks"] = link.nvlinks
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_nbytes"] = properties.L2_cache_size
        # Each call uses the chain's buffers again and nothing flushes the cache, so buffers that fit stay in it.
        found["l2"] = "warm"
        allowed = all(device.capability >= _DEPENDENT_LAUNCH for device in devices)
        found["dependent_launch"] = "as each kernel asks for it" if allowed else "not on these devices"
    return found


def clocks(job: Job) -> dict[str, Any]:
    """Read this rank's device clocks, in MHz, and the reasons for throttling; or the reason that they can't be read."""
    if job.device.type != "cuda":
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(job.device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return {
                "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "sm_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
                "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
                # A bit mask of nvmlClocksEventReason…; 1 means an idle device.
                "held_back_by": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            }
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # noqa: BLE001 - the record keeps the reason instead, and NVML raises classes of its own
        return {"unknown": describe(error)}
