"""Machines by their data sheets, with a rank on each GPU, and groups of ranks on CPUs.

Compute capabilities are those of https://developer.nvidia.com/cuda-gpus, numbers of NVLinks and memory those of
NVIDIA's data sheet of each GPU; a driver reports somewhat less memory. Other facts have their source beside them.
"""

from __future__ import annotations

import dataclasses

from comm_core.topology import Device, Host, Link, RankInfo, Topology

__all__ = ["MACHINES", "Gpu", "Machine"]

_GIB = 1 << 30
_VERSIONS = {"comm_core": "0.1.0", "python": "3.12.8", "torch": "2.13.0+cpu"}
_CUDA_VERSIONS = {**_VERSIONS, "torch": "2.13.0+cu130", "cuda": "13.0", "nccl": "2.29.7", "driver": "580.95.05"}
# The NVLink clique of a rack. The driver reports one only where NVLink joins several hosts.
_CLIQUE = "5a1f6c0e-6f0c-4d53-9f65-2f0c5d1b7a42/1"

# NVML's answer for two GPUs of which at least one has no NVLink.
_NO_NVLINK = "NVML: P2P_STATUS_NOT_SUPPORTED"
# Every GPU has all its NVLinks to the switch, over which it reaches each other GPU.
_NVSWITCH = Link(18, p2p=True)
# NVSwitch of the Ampere generation: a GPU has 12 NVLinks (NVIDIA A100 Tensor Core GPU Architecture, "NVLink").
_NVSWITCH_AMPERE = Link(12, p2p=True)
_PCIE = Link(0, p2p=True, reason=_NO_NVLINK)
# NVIDIA's own driver gives GeForce cards of the 40 series no peer access, in any machine. The status is the one that it
# reported of two GeForce cards of the next series (https://github.com/noonghunna/club-3090/issues/1130).
_NO_PEER_ACCESS = Link(0, p2p=False, reason="NVML: P2P_STATUS_GPU_NOT_SUPPORTED")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A model of GPU.

    Attributes:
        name: the driver's name for it.
        capability: its compute capability.
        memory_nbytes: the data sheet's memory.
    """

    name: str
    capability: tuple[int, int]
    memory_nbytes: int


_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * _GIB)
_H200 = Gpu("NVIDIA H200", (9, 0), 141 * _GIB)
# NVIDIA publishes no data sheet. Its NVLink has 900 GB/s (https://github.com/deepseek-ai/DeepEP/issues/16), as much as
# Hopper's 18 NVLinks.
_H20 = Gpu("NVIDIA H20", (9, 0), 96 * _GIB)
_B200 = Gpu("NVIDIA B200", (10, 0), 180 * _GIB)
_GB200 = Gpu("NVIDIA GB200", (10, 0), 186 * _GIB)
_A100_SXM = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * _GIB)
_A100_PCIE = Gpu("NVIDIA A100 80GB PCIe", (8, 0), 80 * _GIB)
_RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * _GIB)
_L40S = Gpu("NVIDIA L40S", (8, 9), 48 * _GIB)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A group of ranks on equal hosts.

    Attributes:
        note: a line about it.
        hosts: the number of hosts.
        ranks_per_host: the number of ranks on each host, each with a GPU of its own if `gpu` isn't None.
        gpu: the model of the GPUs; None for ranks on CPUs.
        link: the connection between every two GPUs of one host.
        fabric: the NVLink clique of all GPUs; None if NVLink joins no hosts.
        first_rank: the rank in the job of the group's first rank.
    """

    note: str
    hosts: int
    ranks_per_host: int
    gpu: Gpu | None = None
    link: Link = _NVSWITCH
    fabric: str | None = None
    first_rank: int = 0

    def topology(self) -> Topology:
        """Return the group's topology, without facts of any plugin."""
        ranks = (
            RankInfo(
                self.first_rank + number,
                _host((self.first_rank + number) // self.ranks_per_host),
                self._device(*divmod(number, self.ranks_per_host)),
                allocator=None if self.gpu is None else "native",
                versions=_VERSIONS if self.gpu is None else _CUDA_VERSIONS,
            )
            for number in range(self.hosts * self.ranks_per_host)
        )
        return Topology.of(ranks, ("cpu",) if self.gpu is None else ("cuda", "cpu"))

    def _device(self, host: int, index: int) -> Device | None:
        if self.gpu is None:
            return None
        peers = (peer for peer in range(self.ranks_per_host) if peer != index)
        return Device(
            "cuda",
            _uuid(host, index),
            self.gpu.name,
            self.gpu.capability,
            self.gpu.memory_nbytes,
            self.fabric,
            {_uuid(host, peer): self.link for peer in peers},
        )


def _host(number: int) -> Host:
    boot_id = f"boot-{number}"
    return Host(
        name=f"node-{number}",
        id=f"{boot_id} ipc 4:1 shm 131:1",
        boot_id=boot_id,
        shm_nbytes=8 * _GIB,
        network=f"4:{number}",
    )


def _uuid(host: int, index: int) -> str:
    return f"GPU-{host:08x}-0000-4000-8000-{index:012x}"


#: By name: one host with NVSwitch, several hosts, PCIe, CPUs.
MACHINES = {
    "hgx-h200": Machine("8 H200 of one host, joined by NVSwitch", 1, 8, _H200),
    "hgx-b200": Machine("8 B200 of one host, joined by NVSwitch", 1, 8, _B200),
    "hgx-h20": Machine("8 H20 of one host, joined by NVSwitch", 1, 8, _H20),
    "hgx-a100": Machine("8 A100 SXM of one host, joined by NVSwitch", 1, 8, _A100_SXM, _NVSWITCH_AMPERE),
    # 18 trays of 4 GPUs (NVIDIA GB200 NVL Multi-Node Tuning Guide, "Understanding Your Grace-Blackwell Systems").
    "gb200-nvl72": Machine("72 GB200 on 18 hosts of one rack, all joined by NVLink", 18, 4, _GB200, fabric=_CLIQUE),
    "gb200-two-hosts": Machine("8 GB200 on 2 hosts of one NVL72 rack", 2, 4, _GB200, fabric=_CLIQUE),
    "two-dgx-h100": Machine("8 H100 joined by NVSwitch on each of two hosts: the group of all", 2, 8, _H100),
    "one-of-two-dgx-h100": Machine("the same two hosts: the group of the second one", 1, 8, _H100, first_rank=8),
    "four-a100-pcie": Machine("4 A100 on the PCIe slots of one host: peer access, no NVLink", 1, 4, _A100_PCIE, _PCIE),
    "eight-l40s": Machine("8 L40S on the PCIe slots of one host: peer access, no NVLink", 1, 8, _L40S, _PCIE),
    "two-rtx-4090": Machine("2 GeForce RTX 4090 of one host: no peer access", 1, 2, _RTX_4090, _NO_PEER_ACCESS),
    "cpus-1-rank": Machine("1 rank on the CPUs of one host", 1, 1),
    "cpus-3-ranks": Machine("3 ranks on the CPUs of one host", 1, 3),
    "cpus-8-ranks": Machine("8 ranks on the CPUs of one host", 1, 8),
    "cpus-64-ranks": Machine("8 ranks on the CPUs of each of 8 hosts", 8, 8),
}
