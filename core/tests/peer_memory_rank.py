"""One of two ranks that register what they read: peer_memory_rank.py RANK FOLDER, for test_peer_memory.py.

The folder has the driver's stand-in and the binding. Inputs lie across pieces of memory that come as open files.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
import tvm_ffi
from comm_core.channel import SessionChannel
from comm_core.registration import PeerMemory, Registry
from comm_core.store import Control

UNIT = 1 << 16
FILES = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class Access(ctypes.Structure):
    """`CUmemAccessDesc`."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int), ("flags", ctypes.c_int))


def allocate(driver: Any, pieces: int) -> int:
    base = ctypes.c_uint64()
    driver.cuMemAddressReserve(ctypes.byref(base), ctypes.c_size_t(pieces * UNIT), 0, 0, 0)
    driver.fake_create.restype = ctypes.c_uint64
    for piece in range(pieces):
        handle = driver.fake_create(ctypes.c_size_t(UNIT), FILES)
        place = ctypes.c_uint64(base.value + piece * UNIT)
        assert driver.cuMemMap(place, ctypes.c_size_t(UNIT), 0, ctypes.c_uint64(handle), 0) == 0
    access = Access(1, 0, 3)
    driver.cuMemSetAccess(base, ctypes.c_size_t(pieces * UNIT), ctypes.byref(access), ctypes.c_size_t(1))
    return base.value


def main(rank: int, folder: Path) -> None:
    # Preloaded, so that who asks for libcuda.so.1 gets this one, whatever driver the machine has.
    driver = ctypes.CDLL(str(folder / "libcuda.so.1"))
    memory = PeerMemory(*tvm_ffi.load_module(str(folder / "binding.so")).peer_memory(0))
    control = Control(dist.FileStore(str(folder / "store"), 2), rank, (0, 1), 120.0)
    control.join(set())
    group: Any = object()
    channel = SessionChannel()
    context = comm.GroupContext(group, rank, 2, torch.device("cpu"), (0, 1), channel, 1 << 30, 60.0)
    registry = Registry(context, memory, 64)
    base = allocate(driver, 3)
    text = f"what rank {rank} has".encode()
    places = [base + UNIT - 7, base + 3 * UNIT - 100, base + 2 * UNIT - 9 - rank]
    for place in places:
        ctypes.memmove(place, text, len(text))
    for capture in range(2):
        with channel.opened(control, f"capture {capture}") as stage:
            with registry.capture():
                tags = [registry.take(place, len(text)) for place in places]
            for tag in tags:
                row = registry.table[tag & 0xFFFFF].tolist()
                assert row[0] == tag
                seen = [ctypes.string_at(address, len(text)) for address in row[1:]]
                assert seen == [b"what rank 0 has", b"what rank 1 has"], seen
            stage.barrier()
    registry.close()
    control.finish()
    sys.stdout.write("right\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
