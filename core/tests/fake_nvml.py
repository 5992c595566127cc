"""Stand-ins for NVML's binding and for torch's view of its GPUs."""

# ruff: noqa: ARG002, N802, N815 - names and parameters are pynvml's

from __future__ import annotations

import ctypes
import types
from typing import Any

UUIDS = tuple(f"GPU-00000000-0000-4000-8000-{number:012x}" for number in range(1, 9))
MIG = "MIG-11111111-0000-4000-8000-000000000001"
READ, WRITE, NVLINK = 0, 1, 2


class NVMLErrorOfFake(Exception):  # noqa: N818 - the probe knows NVML's errors by how their names begin
    def __init__(self, value: int, words: str) -> None:
        super().__init__(words)
        self.value = value


NOT_SUPPORTED = NVMLErrorOfFake(3, "Not Supported")
INVALID = NVMLErrorOfFake(2, "Invalid Argument")


class Fabric(ctypes.Structure):
    _fields_ = (
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint),
        ("state", ctypes.c_uint),
    )


class FakeNvml:
    """Behaves as `pynvml` does: a handle is a device's index, or the UUID of a MIG instance."""

    NVMLError = NVMLErrorOfFake
    NVML_SUCCESS = 0
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_NVLINK_MAX_LINKS = 36
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    NVML_GPU_FABRIC_STATE_COMPLETED = 3
    c_nvmlGpuFabricInfoV_t = Fabric

    def __init__(
        self,
        count: int = 2,
        *,
        p2p: dict[tuple[int, int, int], int] | None = None,
        remotes: dict[int, list[int | None]] | None = None,
        fabric: tuple[int, bytes] | None = None,
        instance: str | None = None,
    ) -> None:
        """What differs from GPUs joined by 18 NVLinks through a switch.

        Args:
            count: GPUs.
            p2p: status by (device, peer, capability); others are OK.
            remotes: by device, where each active NVLink ends: a device's index, or None for a switch.
            fabric: state and cluster UUID; None: not supported.
            instance: the MIG instance into which every device is split.
        """
        self.count = count
        self.p2p = p2p or {}
        self.remotes = remotes or {index: [None] * 18 for index in range(count)}
        self.fabric = fabric
        self.instance = instance
        self.users = 0

    def nvmlInit(self) -> None:
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        assert self.users > 0
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int | str:
        if uuid == self.instance:
            return uuid
        if uuid not in UUIDS[: self.count]:
            raise NVMLErrorOfFake(6, "Not Found")
        return UUIDS.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int | str) -> str:
        return handle if isinstance(handle, str) else UUIDS[handle]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        if self.instance is None:
            raise NOT_SUPPORTED
        return [1, 1]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> str:
        assert self.instance is not None
        return self.instance

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(total=80 << 30)

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(domain=0, bus=0x10 + handle, device=0)

    def nvmlDeviceGetP2PStatus(self, handle: int, peer: int, capability: int) -> int:
        return self.p2p.get((handle, peer, capability), 0)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= len(self.remotes[handle]):
            raise INVALID
        return 1

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return 2 if self.remotes[handle][link] is None else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        remote = self.remotes[handle][link]
        assert remote is not None
        return self.nvmlDeviceGetPciInfo(remote)

    def nvmlDeviceGetGpuFabricInfoV(self, handle: int, reference: Any) -> None:
        # The real one hands its argument on as it is: a structure would go by value where NVML reads an address.
        info = reference._obj
        if self.fabric is None:
            raise NOT_SUPPORTED
        info.state, cluster = self.fabric
        info.clusterUuid = (ctypes.c_uint8 * 16)(*cluster)
        info.cliqueId = 5


def fake_torch(
    count: int = 2, *, peers: bool = True, snapshot: Any = None, backend: str = "native", first: int = 0
) -> Any:
    """A torch with `count` visible GPUs, the first of which is number `first` of `UUIDS`."""

    def properties(index: int) -> Any:
        assert 0 <= index < count
        bare = UUIDS[first + index].removeprefix("GPU-")
        return types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, uuid=bare)

    cuda = types.SimpleNamespace(
        current_device=lambda: 0,
        device_count=lambda: count,
        get_device_properties=properties,
        can_device_access_peer=lambda _one, _other: peers,
        get_allocator_backend=lambda: backend,
        memory=types.SimpleNamespace(_snapshot=lambda: snapshot or state_of_allocator()),
        nccl=types.SimpleNamespace(version=lambda: (2, 29, 7)),
    )
    return types.SimpleNamespace(__version__="2.13.0+cu130", version=types.SimpleNamespace(cuda="13.0"), cuda=cuda)


def state_of_allocator(*, setting: bool = False, segments: tuple[bool, ...] = ()) -> dict[str, Any]:
    return {
        "allocator_settings": {"expandable_segments": setting},
        "segments": [{"is_expandable": expandable} for expandable in segments],
    }
