"""Memory of a GPU that several processes map: the CUDA driver's virtual memory management, by cuda-bindings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["CudaMemory"]


class CudaMemory:
    """Allocates memory of one device, exports it to peers, and maps it and theirs.

    A handle is a reference to physical memory, which is freed once no handle and no mapping of it is left in any
    process. Peers get an open file or, with `fabric`, bytes that work on every host of an NVLink clique.

    Args:
        device: the device, which accesses all that this object maps.
        fabric: whether the ranks are on several hosts.

    Raises:
        ImportError: cuda-bindings isn't installed.
        RuntimeError: there is no driver, or it refuses; likewise in every method.
    """

    def __init__(self, device: torch.device, *, fabric: bool) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._context: Any = None  # until the device is known to the driver
        self._device = device
        handle_types = driver.CUmemAllocationHandleType
        self._fabric = fabric
        self._type = (
            handle_types.CU_MEM_HANDLE_TYPE_FABRIC if fabric else handle_types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.requestedHandleTypes = self._type
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device.index
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuInit", 0)
        # The primary context is the one that torch and the CUDA runtime use. It stays retained: torch keeps it, too.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device.index))

    def granularity(self) -> int:
        """Return the number of bytes of which sizes are multiples."""
        recommended = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties, recommended))

    def create(self, nbytes: int) -> Any:
        """Allocate physical memory; return its handle."""
        return self._call("cuMemCreate", nbytes, self._properties, 0)

    def export(self, handle: Any) -> int | bytes:
        """Return a new descriptor by which a peer maps the memory, or bytes with `fabric`."""
        shared = self._call("cuMemExportToShareableHandle", handle, self._type, 0)
        return bytes(shared.data) if self._fabric else int(shared)

    def import_(self, shared: int | bytes) -> Any:
        """Return a handle of a peer's memory from what it exported; a descriptor stays the caller's to close."""
        return self._call("cuMemImportFromShareableHandle", shared, self._type)

    def release(self, handle: Any) -> None:
        """Drop a handle; the memory lives on while a process maps it."""
        self._call("cuMemRelease", handle)

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses; return the first."""
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Map memory at reserved addresses, for the device to read and write."""
        self._call("cuMemMap", address, nbytes, 0, handle, 0)
        try:
            self._call("cuMemSetAccess", address, nbytes, [self._access], 1)
        except RuntimeError:
            self._call("cuMemUnmap", address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap memory; the addresses stay reserved."""
        self._call("cuMemUnmap", address, nbytes)

    def free(self, address: int, nbytes: int) -> None:
        """Give reserved addresses back."""
        self._call("cuMemAddressFree", address, nbytes)

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        """Return mapped memory as a tensor: uint8, `[nbytes]`."""
        return torch.as_tensor(_CudaArray(address, nbytes), device=self._device)

    def synchronize(self) -> None:
        """Wait until all work on the device has ended."""
        torch.cuda.synchronize(self._device)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver in the device's context; return its result."""
        with self._current():
            status, *results = getattr(self._driver, function)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            _, text = self._driver.cuGetErrorString(status)
            raise RuntimeError(f"{function}: {text.decode() if text else 'an unknown error'}")
        return results[0] if results else None

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device's context current, once it is known, and restore the previous one."""
        if self._context is None:
            yield
            return
        self._driver.cuCtxPushCurrent(self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()


class _CudaArray:
    """Memory of a GPU as torch reads it: version 3 of the CUDA Array Interface (numba's documentation has it)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
