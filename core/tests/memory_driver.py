"""Two ranks share memory of the driver that fake_cuda.cpp stands for: memory_driver.py LIBRARY; test_memory.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

import pytest
import torch
from comm_core import memory
from comm_core._memory.cpu import CpuMemory
from comm_core._memory.cuda import CudaMemory
from test_memory import NBYTES, check_peers, on_ranks

PAGE = 1 << 16  # `kUnit` in fake_cuda.h


class HostCuda(CudaMemory):
    """Device memory that this process can read."""

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        return CpuMemory().view(address, nbytes)

    def synchronize(self) -> None:
        pass


def shared(fabric: bool = False) -> None:
    def work(context: Any) -> None:
        device = HostCuda(torch.device("cuda", 0), fabric=fabric)
        buffer = memory.SharedBuffer(NBYTES, context, lambda tensor: tensor.fill_(9), device)
        assert buffer.nbytes == 2 * PAGE
        addresses = buffer.addresses
        check_peers(buffer, context, 5)
        context.control.barrier()
        buffer.suspend()
        context.control.barrier()
        buffer.resume()
        assert buffer.addresses == addresses
        assert (buffer.tensor == 9).all()
        context.control.barrier()
        check_peers(buffer, context, 5)
        context.control.barrier()
        buffer.close()

    results = on_ranks(2, work)
    assert results == [None] * 2, results


def fabric() -> None:
    shared(fabric=True)


def refusals() -> None:
    device = HostCuda(torch.device("cuda", 0), fabric=False)
    with pytest.raises(RuntimeError, match="cuMemCreate: invalid argument"):
        device.create(PAGE + 1)
    handle = device.create(PAGE)
    address = device.reserve(2 * PAGE)
    with pytest.raises(RuntimeError, match="cuMemMap: invalid argument"):
        device.map(address, 2 * PAGE, handle)
    file = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(RuntimeError, match="cuMemImportFromShareableHandle: invalid argument"):
        device.import_(file)
    os.close(file)
    # What was imported isn't handed on.
    exported = device.export(handle)
    imported = device.import_(exported)
    with pytest.raises(RuntimeError, match="cuMemExportToShareableHandle: invalid argument"):
        device.export(imported)
    os.close(exported)
    # A device that can't be accessed keeps no mapping.
    device._access.location.id = 3
    with pytest.raises(RuntimeError, match="cuMemSetAccess"):
        device.map(address, PAGE, handle)
    for each in (handle, imported):
        device.release(each)
    device.free(address, 2 * PAGE)


if __name__ == "__main__":
    library = ctypes.CDLL(sys.argv[1])
    for part in (shared, fabric, refusals):
        part()
        left = library.fake_open()
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(f"{part.__name__}: {left} are open\n")
