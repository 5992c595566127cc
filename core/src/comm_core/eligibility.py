"""The conditions that backends with CUDA kernels check first: pure functions of a group's topology.

Each function returns why the group can't be served, as one sentence without a full stop, or "" if the condition holds.
"""

from __future__ import annotations

from comm_core.topology import Topology

__all__ = ["no_cuda", "no_native_code", "shared_device", "unfit_devices"]


def no_cuda(topology: Topology) -> str:
    """Check that the group reduces CUDA tensors and every rank has a CUDA device."""
    if "cuda" not in topology.device_types:
        return "it sums CUDA tensors, and this group has none"
    devices = [info.device for info in topology.ranks]
    if not all(device is not None and device.type == "cuda" for device in devices):
        return "not every rank has a CUDA device"
    return ""


def no_native_code(topology: Topology, name: str) -> str:
    """Check that the native code can be used on every rank: no `probe` reported something in its fact "missing".

    Args:
        topology: the group.
        name: the backend's.
    """
    for rank, info in enumerate(topology.ranks):
        facts = info.facts.get(name)
        if facts is None:
            return f"rank {rank} didn't report whether it has the native code"
        if facts["missing"]:
            return f"on rank {rank} {facts['missing']}"
    return ""


def shared_device(topology: Topology) -> str:
    """Check that the ranks have distinct devices; each of them must have one."""
    uuids = [info.device.uuid for info in topology.ranks if info.device is not None]
    for rank, uuid in enumerate(uuids):
        if uuid in uuids[:rank]:
            return f"ranks {uuids.index(uuid)} and {rank} share the device {uuid}"
    return ""


def unfit_devices(topology: Topology, oldest: tuple[int, int]) -> str:
    """Check that the ranks' devices are distinct, of one compute capability, and new enough.

    Args:
        topology: a group whose ranks all have a device.
        oldest: the lowest compute capability that is accepted.
    """
    shared = shared_device(topology)
    if shared:
        return shared
    devices = [info.device for info in topology.ranks if info.device is not None]
    capabilities = sorted({device.capability for device in devices})
    listed = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    if len(capabilities) > 1:
        return f"its devices have different compute capabilities: {listed}"
    if capabilities[0] < oldest:
        return f"it takes compute capability {oldest[0]}.{oldest[1]} or newer, and the devices have {listed}"
    return ""
