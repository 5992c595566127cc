// CUDA virtual memory that several processes of one host map: host code over the CUDA driver's API.
//
// The owner creates a physical allocation and exports it as an open file; a peer imports the file
// (`comm_core._control.mailbox` sends files from process to process). Owner and peers map the allocation, each at an
// address of its own. The driver is opened at its first use, so that code which includes this header loads on machines
// without a driver. Errors are std::runtime_error.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace comm_core {

// The driver's functions that this header uses.
class Driver {
  public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    // A macro, since cuda.h renames functions to their newest versions by macros: so name and type are of one version.
#define COMM_CORE_DRIVER_NAME(name) #name
#define COMM_CORE_DRIVER(name) decltype(&::name) name##_ = symbol<decltype(&::name)>(COMM_CORE_DRIVER_NAME(name))
    COMM_CORE_DRIVER(cuCtxPopCurrent);
    COMM_CORE_DRIVER(cuCtxPushCurrent);
    COMM_CORE_DRIVER(cuDeviceGet);
    COMM_CORE_DRIVER(cuDevicePrimaryCtxRelease);
    COMM_CORE_DRIVER(cuDevicePrimaryCtxRetain);
    COMM_CORE_DRIVER(cuGetErrorString);
    COMM_CORE_DRIVER(cuMemAddressFree);
    COMM_CORE_DRIVER(cuMemAddressReserve);
    COMM_CORE_DRIVER(cuMemCreate);
    COMM_CORE_DRIVER(cuMemExportToShareableHandle);
    COMM_CORE_DRIVER(cuMemGetAllocationGranularity);
    COMM_CORE_DRIVER(cuMemImportFromShareableHandle);
    COMM_CORE_DRIVER(cuMemMap);
    COMM_CORE_DRIVER(cuMemRelease);
    COMM_CORE_DRIVER(cuMemSetAccess);
    COMM_CORE_DRIVER(cuMemUnmap);
#undef COMM_CORE_DRIVER
#undef COMM_CORE_DRIVER_NAME

    void check(CUresult status, const char* call) const {
        if (status == CUDA_SUCCESS) return;
        const char* text = nullptr;
        if (cuGetErrorString_(status, &text) != CUDA_SUCCESS || text == nullptr) text = "an unknown error";
        throw std::runtime_error(std::string(call) + ": " + text);
    }

  private:
    template <typename Function>
    Function symbol(const char* name) {
        if (library_ == nullptr) library_ = dlopen("libcuda.so.1", RTLD_NOW);
        void* const address = library_ == nullptr ? nullptr : dlsym(library_, name);
        if (address == nullptr) {
            throw std::runtime_error(library_ == nullptr
                                         ? "this machine has no CUDA driver (libcuda.so.1)"
                                         : std::string("the CUDA driver is too old: it has no ") + name);
        }
        return reinterpret_cast<Function>(address);
    }

    static inline void* library_ = nullptr;
};

// A device's allocations, which peers map, and its mappings of peers' allocations. Not thread-safe.
class VirtualMemory {
  public:
    explicit VirtualMemory(int device) : driver_(Driver::get()), device_(device) {
        CUdevice handle = 0;
        driver_.check(driver_.cuDeviceGet_(&handle, device), "cuDeviceGet");
        driver_.check(driver_.cuDevicePrimaryCtxRetain_(&context_, handle), "cuDevicePrimaryCtxRetain");
    }
    VirtualMemory(const VirtualMemory&) = delete;
    VirtualMemory& operator=(const VirtualMemory&) = delete;
    ~VirtualMemory() {
        close();
        CUdevice handle = 0;
        if (driver_.cuDeviceGet_(&handle, device_) == CUDA_SUCCESS) driver_.cuDevicePrimaryCtxRelease_(handle);
    }

    // Returns the size of an allocation for `nbytes` bytes: a multiple of the device's granularity.
    size_t rounded(size_t nbytes) const {
        size_t granularity = 0;
        const CUmemAllocationProp properties = shareable();
        driver_.check(
            driver_.cuMemGetAllocationGranularity_(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            "cuMemGetAllocationGranularity");
        return (nbytes + granularity - 1) / granularity * granularity;
    }

    // Allocates physical memory of this device for `nbytes` bytes. Returns the allocation's number in this object.
    int64_t create(size_t nbytes) {
        const Current here(*this);
        const CUmemAllocationProp properties = shareable();
        CUmemGenericAllocationHandle allocation = 0;
        driver_.check(driver_.cuMemCreate_(&allocation, rounded(nbytes), &properties, 0), "cuMemCreate");
        return add(allocation);
    }

    // Opens an allocation as a file, for peers to import. Returns its descriptor, which the caller closes.
    int export_file(int64_t number) const {
        const Current here(*this);
        int file = -1;
        driver_.check(driver_.cuMemExportToShareableHandle_(&file, allocation(number), kType, 0),
                      "cuMemExportToShareableHandle");
        return file;
    }

    // Imports a peer's allocation from its file, which stays the caller's to close. Returns the allocation's number in
    // this object.
    int64_t import_file(int file) {
        const Current here(*this);
        CUmemGenericAllocationHandle allocation = 0;
        void* const handle = reinterpret_cast<void*>(static_cast<uintptr_t>(file));
        driver_.check(driver_.cuMemImportFromShareableHandle_(&allocation, handle, kType),
                      "cuMemImportFromShareableHandle");
        return add(allocation);
    }

    // Maps an allocation of `nbytes` bytes, for this device to read and write. Returns its address.
    CUdeviceptr map(int64_t number, size_t nbytes) {
        const Current here(*this);
        const CUmemGenericAllocationHandle handle = allocation(number);
        const size_t size = rounded(nbytes);
        CUdeviceptr base = 0;
        driver_.check(driver_.cuMemAddressReserve_(&base, size, 0, 0, 0), "cuMemAddressReserve");
        const CUresult status = driver_.cuMemMap_(base, size, 0, handle, 0);
        if (status != CUDA_SUCCESS) driver_.cuMemAddressFree_(base, size);
        driver_.check(status, "cuMemMap");
        mapped_.emplace_back(base, size);
        CUmemAccessDesc access{};
        access.location = shareable().location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        driver_.check(driver_.cuMemSetAccess_(base, size, &access, 1), "cuMemSetAccess");
        return base;
    }

    // Unmaps and releases everything; physical memory is freed once no process has it mapped. No kernel may use it any
    // more. The driver's errors are ignored, because the driver may already be unloaded when the process ends.
    void close() noexcept {
        if (driver_.cuCtxPushCurrent_(context_) == CUDA_SUCCESS) {
            for (const auto& [base, size] : mapped_) {
                driver_.cuMemUnmap_(base, size);
                driver_.cuMemAddressFree_(base, size);
            }
            for (const CUmemGenericAllocationHandle allocation : allocations_) driver_.cuMemRelease_(allocation);
            CUcontext context = nullptr;
            driver_.cuCtxPopCurrent_(&context);
        }
        mapped_.clear();
        allocations_.clear();
    }

  private:
    static constexpr auto kType = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

    // Makes the device's context current, and restores the previous one at the end of the scope.
    class Current {
      public:
        explicit Current(const VirtualMemory& memory) : driver_(memory.driver_) {
            driver_.check(driver_.cuCtxPushCurrent_(memory.context_), "cuCtxPushCurrent");
        }
        ~Current() {
            CUcontext context = nullptr;
            driver_.cuCtxPopCurrent_(&context);
        }
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

      private:
        const Driver& driver_;
    };

    CUmemAllocationProp shareable() const {
        CUmemAllocationProp properties{};
        properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.requestedHandleTypes = kType;
        properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = device_;
        return properties;
    }

    int64_t add(CUmemGenericAllocationHandle allocation) {
        allocations_.push_back(allocation);
        return static_cast<int64_t>(allocations_.size()) - 1;
    }

    CUmemGenericAllocationHandle allocation(int64_t number) const {
        if (number < 0 || number >= static_cast<int64_t>(allocations_.size())) {
            throw std::runtime_error("there is no allocation number " + std::to_string(number));
        }
        return allocations_[static_cast<size_t>(number)];
    }

    const Driver& driver_;
    int device_;
    CUcontext context_ = nullptr;
    std::vector<CUmemGenericAllocationHandle> allocations_;
    std::vector<std::pair<CUdeviceptr, size_t>> mapped_;
};

}  // namespace comm_core
