// Stands for libcuda.so.1 where there is no GPU: device memory is shared memory of this process. It refuses what the
// driver refuses, and counts what is open. test_peer_memory.py.
#include "fake_cuda.h"

#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>

namespace {

struct Physical {
    int file;
    size_t nbytes;
    unsigned types;
    int references;
    unsigned long long id;
};
struct Mapped {
    size_t nbytes;
    CUmemGenericAllocationHandle handle;  // 0: cudaMalloc's
    unsigned long long id;
    int file;
    bool device;  // else only a range of addresses
};

std::map<CUmemGenericAllocationHandle, Physical> physical;
std::map<CUdeviceptr, Mapped> mapped;
std::map<CUdeviceptr, size_t> reserved, opened;
unsigned long long next = 1;
int depth = 0;

char* at(CUdeviceptr address) {
    return reinterpret_cast<char*>(address);
}
int file_of(size_t nbytes) {
    const int file = memfd_create("device", 0);
    return ftruncate(file, static_cast<off_t>(nbytes)) == 0 ? file : -1;
}
CUdeviceptr view(int file, size_t nbytes) {
    return reinterpret_cast<CUdeviceptr>(mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
}
std::map<CUdeviceptr, Mapped>::iterator around(CUdeviceptr address) {
    auto found = mapped.upper_bound(address);
    if (found == mapped.begin()) return mapped.end();
    --found;
    return address < found->first + found->second.nbytes ? found : mapped.end();
}

}  // namespace

#define NEEDS_CONTEXT \
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT

extern "C" {

CUdeviceptr fake_malloc(size_t nbytes) {
    const int file = file_of(nbytes);
    const CUdeviceptr base = view(file, nbytes);
    mapped[base] = {nbytes, 0, next++, file, true};
    return base;
}
void fake_replace(CUdeviceptr base) {
    mapped.at(base).id = next++;
}
CUmemGenericAllocationHandle fake_create(size_t nbytes, unsigned types) {
    const CUmemGenericAllocationHandle handle = 1000 + next++;
    physical[handle] = {file_of(nbytes), nbytes, types, 1, next++};
    return handle;
}
int fake_open() {
    int count = static_cast<int>(opened.size() + reserved.size()) + depth;
    for (const auto& [handle, allocation] : physical) count += allocation.references;
    return count;
}

CUresult cuGetErrorString(CUresult error, const char** words) {
    *words = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "another error";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = reinterpret_cast<CUcontext>(8);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    depth += context == reinterpret_cast<CUcontext>(8);
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext*) {
    --depth;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
    const auto found = around(address);
    if (found == mapped.end()) return CUDA_ERROR_INVALID_VALUE;
    const Mapped& memory = found->second;
    const bool legacy = memory.handle == 0;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *static_cast<int*>(data) = 0;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
            *static_cast<int*>(data) = legacy;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
            *static_cast<unsigned*>(data) = legacy ? 0 : physical.at(memory.handle).types;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID:
            *static_cast<unsigned long long*>(data) = memory.id;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* nbytes, CUdeviceptr address) {
    NEEDS_CONTEXT;
    const auto found = around(address);
    if (found == mapped.end()) return CUDA_ERROR_NOT_FOUND;
    *base = found->first;
    *nbytes = found->second.nbytes;
    return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr base) {
    NEEDS_CONTEXT;
    if (mapped.count(base) == 0 || mapped.at(base).handle != 0) return CUDA_ERROR_INVALID_VALUE;
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle->reserved + 7, &base, sizeof base);  // zeros in front: bytes, no string
    return CUDA_SUCCESS;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* address, CUipcMemHandle handle, unsigned flags) {
    NEEDS_CONTEXT;
    CUdeviceptr base = 0;
    std::memcpy(&base, handle.reserved + 7, sizeof base);
    if (mapped.count(base) == 0 || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
    *address = view(mapped.at(base).file, mapped.at(base).nbytes);
    opened[*address] = mapped.at(base).nbytes;
    return CUDA_SUCCESS;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    NEEDS_CONTEXT;
    if (opened.count(address) == 0) return CUDA_ERROR_INVALID_VALUE;
    munmap(at(address), opened.at(address));
    opened.erase(address);
    return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
    NEEDS_CONTEXT;
    const auto found = around(reinterpret_cast<CUdeviceptr>(address));
    if (found == mapped.end() || found->second.handle == 0) return CUDA_ERROR_INVALID_VALUE;
    *handle = found->second.handle;
    ++physical.at(*handle).references;
    return CUDA_SUCCESS;
}
CUresult cuMemExportToShareableHandle(void* out,
                                      CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type,
                                      unsigned long long) {
    const Physical& allocation = physical.at(handle);
    if ((allocation.types & type) == 0) return CUDA_ERROR_INVALID_VALUE;
    if (type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
        *static_cast<int*>(out) = dup(allocation.file);
    } else {
        std::memset(out, 0, sizeof(CUmemFabricHandle));
        std::memcpy(out, &handle, sizeof handle);
    }
    return CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle,
                                        void* from,
                                        CUmemAllocationHandleType type) {
    NEEDS_CONTEXT;
    int file = static_cast<int>(reinterpret_cast<intptr_t>(from));
    if (type == CU_MEM_HANDLE_TYPE_FABRIC) {
        CUmemGenericAllocationHandle theirs = 0;
        std::memcpy(&theirs, from, sizeof theirs);
        if (physical.count(theirs) == 0) return CUDA_ERROR_INVALID_VALUE;
        file = physical.at(theirs).file;
    }
    const off_t nbytes = lseek(file, 0, SEEK_END);
    if (nbytes <= 0) return CUDA_ERROR_INVALID_VALUE;
    *handle = 1000 + next++;
    physical[*handle] = {dup(file), static_cast<size_t>(nbytes), 0, 1, next++};
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    if (physical.count(handle) == 0 || physical.at(handle).references == 0) return CUDA_ERROR_INVALID_VALUE;
    --physical.at(handle).references;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t nbytes, size_t, CUdeviceptr, unsigned long long) {
    void* const found = mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = reinterpret_cast<CUdeviceptr>(found);
    reserved[*address] = nbytes;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t nbytes) {
    const auto inside = mapped.lower_bound(address);
    const bool used = inside != mapped.end() && inside->first < address + nbytes;
    if (reserved.count(address) == 0 || reserved.at(address) != nbytes || used) return CUDA_ERROR_INVALID_VALUE;
    munmap(at(address), nbytes);
    reserved.erase(address);
    return CUDA_SUCCESS;
}
CUresult cuMemMap(
    CUdeviceptr address, size_t nbytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long) {
    if (physical.count(handle) == 0 || offset != 0 || nbytes > physical.at(handle).nbytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // Nobody may touch it before `cuMemSetAccess`.
    mmap(at(address), nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical.at(handle).file, 0);
    mapped[address] = {nbytes, handle, physical.at(handle).id, physical.at(handle).file, true};
    return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t nbytes, const CUmemAccessDesc* access, size_t count) {
    if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE || access->location.id != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    mprotect(at(address), nbytes, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t nbytes) {
    if (mapped.count(address) == 0 || mapped.at(address).nbytes != nbytes) return CUDA_ERROR_INVALID_VALUE;
    mmap(at(address), nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    mapped.erase(address);
    return CUDA_SUCCESS;
}

}  // extern "C"
