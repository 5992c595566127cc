// Stands for libcuda.so.1 where there is no GPU: device memory is shared memory of this process. It refuses what the
// driver refuses, and counts what is open. test_memory.py.
#include "fake_cuda.h"

#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

struct Physical {
    int file;
    size_t nbytes;
    unsigned types;  // of handles that it can be shared by
    int references;
};

std::map<CUmemGenericAllocationHandle, Physical> physical;
std::map<CUdeviceptr, size_t> mapped, reserved;
unsigned long long next = 1;
thread_local int depth = 0;
std::mutex lock;  // the ranks of a test are threads

void* at(CUdeviceptr address) {
    return reinterpret_cast<void*>(address);
}

}  // namespace

// cuda-bindings calls without Python's lock.
#define LOCKED const std::lock_guard<std::mutex> guard(lock)
#define NEEDS_CONTEXT                                  \
    if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT; \
    LOCKED

extern "C" {

int fake_open() {
    LOCKED;
    int count = static_cast<int>(mapped.size() + reserved.size()) + depth;
    for (const auto& [handle, allocation] : physical) count += allocation.references;
    return count;
}

CUresult cuInit(unsigned) {
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
// cuda-bindings finds every function by this one.
CUresult cuGetProcAddress_v2(
    const char* name, void** address, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
    for (const char* const version : {"_v2", ""}) {
        *address = dlsym(RTLD_DEFAULT, (std::string(name) + version).c_str());
        if (*address != nullptr) break;
    }
    const bool found = *address != nullptr;
    if (status != nullptr) *status = found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
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

CUresult cuMemGetAllocationGranularity(size_t* unit,
                                       const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags) {
    if (properties->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
    *unit = kUnit;
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle,
                     size_t nbytes,
                     const CUmemAllocationProp* properties,
                     unsigned long long) {
    NEEDS_CONTEXT;
    const bool here = properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE && properties->location.id == 0;
    if (!here || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED || nbytes == 0 || nbytes % kUnit != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const int file = memfd_create("device", 0);
    if (ftruncate(file, static_cast<off_t>(nbytes)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = 1000 + next++;
    physical[*handle] = {file, nbytes, static_cast<unsigned>(properties->requestedHandleTypes), 1};
    return CUDA_SUCCESS;
}
CUresult cuMemExportToShareableHandle(void* out,
                                      CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type,
                                      unsigned long long) {
    NEEDS_CONTEXT;
    const Physical& allocation = physical.at(handle);
    if ((allocation.types & type) == 0) return CUDA_ERROR_INVALID_VALUE;
    if (type == CU_MEM_HANDLE_TYPE_FABRIC) {
        std::memset(out, 0, sizeof(CUmemFabricHandle));
        std::memcpy(out, &handle, sizeof handle);
    } else {
        *static_cast<int*>(out) = dup(allocation.file);
    }
    return CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle,
                                        void* from,
                                        CUmemAllocationHandleType type) {
    NEEDS_CONTEXT;
    int file = static_cast<int>(reinterpret_cast<intptr_t>(from));
    if (type == CU_MEM_HANDLE_TYPE_FABRIC) {
        CUmemGenericAllocationHandle exported = 0;
        std::memcpy(&exported, from, sizeof exported);
        file = physical.at(exported).file;
    }
    const off_t nbytes = lseek(file, 0, SEEK_END);
    if (nbytes <= 0) return CUDA_ERROR_INVALID_VALUE;
    *handle = 1000 + next++;
    physical[*handle] = {dup(file), static_cast<size_t>(nbytes), 0, 1};
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    LOCKED;
    if (physical.count(handle) == 0 || physical.at(handle).references == 0) return CUDA_ERROR_INVALID_VALUE;
    --physical.at(handle).references;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t nbytes, size_t, CUdeviceptr, unsigned long long) {
    LOCKED;
    void* const found = mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = reinterpret_cast<CUdeviceptr>(found);
    reserved[*address] = nbytes;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t nbytes) {
    LOCKED;
    const bool used = mapped.count(address) != 0;
    if (reserved.count(address) == 0 || reserved.at(address) != nbytes || used) return CUDA_ERROR_INVALID_VALUE;
    munmap(at(address), nbytes);
    reserved.erase(address);
    return CUDA_SUCCESS;
}
CUresult cuMemMap(
    CUdeviceptr address, size_t nbytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long) {
    LOCKED;
    if (physical.count(handle) == 0 || offset != 0 || nbytes > physical.at(handle).nbytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // No access is allowed before `cuMemSetAccess`.
    mmap(at(address), nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical.at(handle).file, 0);
    mapped[address] = nbytes;
    return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t nbytes, const CUmemAccessDesc* access, size_t count) {
    LOCKED;
    if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE || access->location.id != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    mprotect(at(address), nbytes, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t nbytes) {
    LOCKED;
    if (mapped.count(address) == 0 || mapped.at(address) != nbytes) return CUDA_ERROR_INVALID_VALUE;
    mmap(at(address), nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    mapped.erase(address);
    return CUDA_SUCCESS;
}

}  // extern "C"
