"""Memory of the CPU that several processes map: `memfd_create(2)`, at addresses that stay reserved while it is away."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import torch

__all__ = ["CpuMemory"]

# From <sys/mman.h> on Linux; Python's mmap has neither.
_PROT_NONE, _MAP_FIXED = 0, 0x10
_FAILED = ctypes.c_void_p(-1).value
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


class CpuMemory:
    """Memory of the CPU, with the methods of `comm_core._memory.cuda.CudaMemory`. A handle is an open file."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap = library.mmap, library.munmap
        self._mmap.restype = ctypes.c_void_p
        address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
        self._munmap.argtypes = [address, size]

    def granularity(self) -> int:
        """Return the number of bytes of which sizes are multiples."""
        return mmap.PAGESIZE

    def create(self, nbytes: int) -> int:
        """Allocate memory; return its handle."""
        handle = os.memfd_create("comm_core", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(handle, nbytes)
            # No process can shrink it under the others, whose next access would be a bus error.
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError:
            os.close(handle)
            raise
        return handle

    def export(self, handle: int) -> int:
        """Return a new descriptor by which a peer maps the memory."""
        return os.dup(handle)

    def import_(self, shared: int) -> int:
        """Return a handle of a peer's memory from its descriptor, which stays the caller's to close."""
        return os.dup(shared)

    def release(self, handle: int) -> None:
        """Close a handle; the memory lives on while a process maps it."""
        os.close(handle)

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses; return the first."""
        return self._call_mmap(None, nbytes, _PROT_NONE, _ANONYMOUS, -1)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map memory at reserved addresses, to read and write."""
        self._call_mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, handle)

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap memory; the addresses stay reserved."""
        self._call_mmap(address, nbytes, _PROT_NONE, _ANONYMOUS | _MAP_FIXED, -1)

    def free(self, address: int, nbytes: int) -> None:
        """Give reserved addresses back."""
        if self._munmap(address, nbytes):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def view(self, address: int, nbytes: int) -> torch.Tensor:
        """Return mapped memory as a tensor: uint8, `[nbytes]`."""
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)

    def synchronize(self) -> None:
        """Wait until all work on the memory has ended: nothing to wait for."""

    def _call_mmap(self, address: int | None, nbytes: int, protection: int, flags: int, file: int) -> int:
        found: int | None = self._mmap(address, nbytes, protection, flags, file, 0)
        if found is None or found == _FAILED:
            raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        return found
