// Device memory of one process that another maps, wherever it came from: host code over the CUDA driver's interface.
//
// What an owner hands out, and how a peer maps it, depends on the allocation:
//
//   cudaMalloc, cuMemAlloc    a handle of CUDA IPC, of the whole allocation
//   cuMemCreate and cuMemMap  a shareable handle of each physical allocation that the tensor lies in: an open file, or
//                             a fabric handle where it allows no other. The peer maps them side by side
//
// Anything else (managed memory, pools of cudaMallocAsync) can't be shared so, and is refused in words. The driver is
// looked up when it is first asked, so what includes this loads on machines without one. Errors are std::runtime_error.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace comm_core {

// The functions of the driver that are used here.
class Driver {
  public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    // A macro, since the headers rename functions to their newest versions by macros: name and type are the same one's.
#define COMM_CORE_DRIVER_NAME(name) #name
#define COMM_CORE_DRIVER(name) decltype(&::name) name##_ = symbol<decltype(&::name)>(COMM_CORE_DRIVER_NAME(name))
    COMM_CORE_DRIVER(cuCtxPopCurrent);
    COMM_CORE_DRIVER(cuCtxPushCurrent);
    COMM_CORE_DRIVER(cuDeviceGet);
    COMM_CORE_DRIVER(cuDevicePrimaryCtxRelease);
    COMM_CORE_DRIVER(cuDevicePrimaryCtxRetain);
    COMM_CORE_DRIVER(cuGetErrorString);
    COMM_CORE_DRIVER(cuIpcCloseMemHandle);
    COMM_CORE_DRIVER(cuIpcGetMemHandle);
    COMM_CORE_DRIVER(cuIpcOpenMemHandle);
    COMM_CORE_DRIVER(cuMemAddressFree);
    COMM_CORE_DRIVER(cuMemAddressReserve);
    COMM_CORE_DRIVER(cuMemExportToShareableHandle);
    COMM_CORE_DRIVER(cuMemGetAddressRange);
    COMM_CORE_DRIVER(cuMemImportFromShareableHandle);
    COMM_CORE_DRIVER(cuMemMap);
    COMM_CORE_DRIVER(cuMemRelease);
    COMM_CORE_DRIVER(cuMemRetainAllocationHandle);
    COMM_CORE_DRIVER(cuMemSetAccess);
    COMM_CORE_DRIVER(cuMemUnmap);
    COMM_CORE_DRIVER(cuPointerGetAttribute);
#undef COMM_CORE_DRIVER
#undef COMM_CORE_DRIVER_NAME

    void check(CUresult status, const char* call) const {
        if (status == CUDA_SUCCESS) return;
        const char* words = nullptr;
        if (cuGetErrorString_(status, &words) != CUDA_SUCCESS || words == nullptr) words = "an unknown error";
        throw std::runtime_error(std::string(call) + ": " + words);
    }

  private:
    template <typename Function>
    Function symbol(const char* name) {
        if (library_ == nullptr) library_ = dlopen("libcuda.so.1", RTLD_NOW);
        void* const found = library_ == nullptr ? nullptr : dlsym(library_, name);
        if (found == nullptr) {
            throw std::runtime_error(library_ == nullptr
                                         ? "there is no CUDA driver (libcuda.so.1) here"
                                         : std::string("the CUDA driver is too old: it has no ") + name);
        }
        return reinterpret_cast<Function>(found);
    }

    static inline void* library_ = nullptr;
};

// By number, since headers before CUDA 12.3 haven't all of their names.
constexpr auto kFabricType = static_cast<CUmemAllocationHandleType>(8);
constexpr auto kMemoryBlockId = static_cast<CUpointer_attribute>(20);
struct FabricHandle {
    char data[64];
};
#if CUDA_VERSION >= 12030
static_assert(kFabricType == CU_MEM_HANDLE_TYPE_FABRIC && kMemoryBlockId == CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID &&
              sizeof(FabricHandle) == sizeof(CUmemFabricHandle));
#endif

// How an allocation is handed out.
enum class Sharing : int32_t { kIpc = 0, kFile = 1, kFabric = 2 };

// A physical allocation, as its owner has it mapped.
struct Piece {
    CUdeviceptr base;
    size_t nbytes;
    std::string key;  // of no other allocation of this process, not even one that has its place later
};

// Where some bytes of memory are.
struct Span {
    Sharing sharing;
    uint64_t offset;  // in the first piece
    std::vector<Piece> pieces;
};

// A device's memory for its peers, and its peers' for this device. One thread at a time.
class PeerMemory {
  public:
    explicit PeerMemory(int device) : driver_(Driver::get()), device_(device) {
        CUdevice handle = 0;
        driver_.check(driver_.cuDeviceGet_(&handle, device), "cuDeviceGet");
        driver_.check(driver_.cuDevicePrimaryCtxRetain_(&context_, handle), "cuDevicePrimaryCtxRetain");
    }
    PeerMemory(const PeerMemory&) = delete;
    PeerMemory& operator=(const PeerMemory&) = delete;
    ~PeerMemory() {
        close();
        CUdevice handle = 0;
        if (driver_.cuDeviceGet_(&handle, device_) == CUDA_SUCCESS) driver_.cuDevicePrimaryCtxRelease_(handle);
    }

    // What the `nbytes` bytes at `address` lie in, and how that can be shared.
    Span locate(CUdeviceptr address, size_t nbytes) const {
        const Current here(*this);
        int owner = -1;
        driver_.check(driver_.cuPointerGetAttribute_(&owner, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address),
                      "no device memory is known at the input's address: cuPointerGetAttribute");
        if (owner != device_) throw std::runtime_error("the input isn't in this device's memory");
        Span span{sharing_of(address), 0, {}};
        for (CUdeviceptr at = address; at < address + nbytes;) {
            Piece piece{};
            driver_.check(driver_.cuMemGetAddressRange_(&piece.base, &piece.nbytes, at), "cuMemGetAddressRange");
            if (sharing_of(at) != span.sharing) {
                throw std::runtime_error("the input lies in allocations of different kinds");
            }
            piece.key = key_of(piece.base);
            at = piece.base + piece.nbytes;
            span.pieces.push_back(std::move(piece));
        }
        if (span.pieces.empty()) throw std::runtime_error("the input is empty");
        if (span.sharing == Sharing::kIpc && span.pieces.size() > 1) {
            throw std::runtime_error("the input goes beyond its allocation");
        }
        span.offset = address - span.pieces.front().base;
        return span;
    }

    // The handle of the piece that begins at `base`: bytes, or for kFile a descriptor in `file` that the caller closes.
    std::string share(CUdeviceptr base, Sharing sharing, int& file) const {
        const Current here(*this);
        file = -1;
        if (sharing == Sharing::kIpc) {
            CUipcMemHandle handle{};
            driver_.check(driver_.cuIpcGetMemHandle_(&handle, base), "cuIpcGetMemHandle");
            return std::string(handle.reserved, sizeof handle.reserved);
        }
        CUmemGenericAllocationHandle allocation = 0;
        driver_.check(driver_.cuMemRetainAllocationHandle_(&allocation, reinterpret_cast<void*>(base)),
                      "cuMemRetainAllocationHandle");
        FabricHandle fabric{};
        void* const into = sharing == Sharing::kFile ? static_cast<void*>(&file) : &fabric;
        const CUresult status = driver_.cuMemExportToShareableHandle_(into, allocation, type_of(sharing), 0);
        driver_.cuMemRelease_(allocation);
        driver_.check(status, "cuMemExportToShareableHandle");
        if (sharing == Sharing::kFile) return {};
        return std::string(fabric.data, sizeof fabric.data);
    }

    // A peer's allocation, by a handle of CUDA IPC: where it is here.
    CUdeviceptr open(const std::string& bytes) {
        const Current here(*this);
        CUipcMemHandle handle{};
        if (bytes.size() != sizeof handle.reserved) throw std::runtime_error("this isn't a handle of CUDA IPC");
        std::memcpy(handle.reserved, bytes.data(), sizeof handle.reserved);
        CUdeviceptr address = 0;
        driver_.check(driver_.cuIpcOpenMemHandle_(&address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
                      "cuIpcOpenMemHandle");
        opened_.push_back(address);
        return address;
    }

    // Lets go of what `open` gave, once for each time that it gave it. Nothing on the device may use it any more.
    void let_go(CUdeviceptr address) {
        const Current here(*this);
        const auto found = std::find(opened_.begin(), opened_.end(), address);
        if (found == opened_.end()) throw std::runtime_error("nothing is open at this address");
        opened_.erase(found);
        driver_.check(driver_.cuIpcCloseMemHandle_(address), "cuIpcCloseMemHandle");
    }

    // A peer's physical allocation, by a descriptor, which stays the caller's, or by a fabric handle: its number here.
    int64_t import_piece(Sharing sharing, int file, const std::string& bytes) {
        const Current here(*this);
        FabricHandle fabric{};
        void* from = reinterpret_cast<void*>(static_cast<uintptr_t>(file));
        if (sharing == Sharing::kFabric) {
            if (bytes.size() != sizeof fabric.data) throw std::runtime_error("this isn't a fabric handle");
            std::memcpy(fabric.data, bytes.data(), sizeof fabric.data);
            from = &fabric;
        }
        CUmemGenericAllocationHandle handle = 0;
        driver_.check(driver_.cuMemImportFromShareableHandle_(&handle, from, type_of(sharing)),
                      "cuMemImportFromShareableHandle");
        imported_.push_back(handle);
        return static_cast<int64_t>(imported_.size()) - 1;
    }

    // Imported pieces, by number, side by side: where the first begins.
    CUdeviceptr map(const std::vector<int64_t>& numbers, const std::vector<int64_t>& nbytes) {
        const Current here(*this);
        Mapping mapping;
        for (const int64_t size : nbytes) mapping.nbytes += static_cast<size_t>(size);
        driver_.check(driver_.cuMemAddressReserve_(&mapping.base, mapping.nbytes, 0, 0, 0), "cuMemAddressReserve");
        try {
            CUdeviceptr at = mapping.base;
            for (size_t i = 0; i < numbers.size(); ++i) {
                const auto size = static_cast<size_t>(nbytes.at(i));
                const auto handle = imported_.at(static_cast<size_t>(numbers[i]));
                // Offsets into an allocation don't exist: the driver takes zero alone.
                driver_.check(driver_.cuMemMap_(at, size, 0, handle, 0), "cuMemMap");
                mapping.pieces.emplace_back(at, size);
                at += size;
            }
            CUmemAccessDesc access{};
            access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
            access.location.id = device_;
            access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
            driver_.check(driver_.cuMemSetAccess_(mapping.base, mapping.nbytes, &access, 1), "cuMemSetAccess");
        } catch (...) {
            unmap(mapping);
            throw;
        }
        mappings_.push_back(std::move(mapping));
        return mappings_.back().base;
    }

    // Lets go of everything that was opened. Nothing on the device may use it any more. What the driver says is of no
    // use to anybody by then; at the process's end there may be none left.
    void close() noexcept {
        if (opened_.empty() && imported_.empty() && mappings_.empty()) return;
        if (driver_.cuCtxPushCurrent_(context_) == CUDA_SUCCESS) {
            for (const Mapping& mapping : mappings_) unmap(mapping);
            for (const CUmemGenericAllocationHandle handle : imported_) driver_.cuMemRelease_(handle);
            for (const CUdeviceptr address : opened_) driver_.cuIpcCloseMemHandle_(address);
            CUcontext context = nullptr;
            driver_.cuCtxPopCurrent_(&context);
        }
        mappings_.clear();
        imported_.clear();
        opened_.clear();
    }

  private:
    struct Mapping {
        CUdeviceptr base = 0;
        size_t nbytes = 0;
        std::vector<std::pair<CUdeviceptr, size_t>> pieces;
    };

    // Makes the device's context current, and the one before again.
    class Current {
      public:
        explicit Current(const PeerMemory& memory) : driver_(memory.driver_) {
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

    static CUmemAllocationHandleType type_of(Sharing sharing) {
        return sharing == Sharing::kFile ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : kFabricType;
    }

    Sharing sharing_of(CUdeviceptr address) const {
        int legacy = 0;
        driver_.check(driver_.cuPointerGetAttribute_(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, address),
                      "cuPointerGetAttribute");
        if (legacy != 0) return Sharing::kIpc;
        // The driver writes 32 bits or 64.
        unsigned long long allowed = 0;
        driver_.check(driver_.cuPointerGetAttribute_(&allowed, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, address),
                      "cuPointerGetAttribute");
        if ((allowed & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0) return Sharing::kFile;
        if ((allowed & kFabricType) != 0) return Sharing::kFabric;
        throw std::runtime_error("its allocation can't be shared, neither by CUDA IPC nor by a shareable handle");
    }

    // Ids of the allocation and of the physical memory, which the driver never gives again; and the place, since which
    // of the two a range of virtual memory has differs between drivers.
    std::string key_of(CUdeviceptr base) const {
        unsigned long long buffer = 0, block = 0;
        if (driver_.cuPointerGetAttribute_(&buffer, CU_POINTER_ATTRIBUTE_BUFFER_ID, base) != CUDA_SUCCESS) buffer = 0;
        if (driver_.cuPointerGetAttribute_(&block, kMemoryBlockId, base) != CUDA_SUCCESS) {
            block = 0;
        }
        if (buffer == 0 && block == 0) throw std::runtime_error("the driver has no id for its allocation");
        return std::to_string(base) + "." + std::to_string(buffer) + "." + std::to_string(block);
    }

    void unmap(const Mapping& mapping) const {
        for (const auto& [base, nbytes] : mapping.pieces) driver_.cuMemUnmap_(base, nbytes);
        driver_.cuMemAddressFree_(mapping.base, mapping.nbytes);
    }

    const Driver& driver_;
    int device_;
    CUcontext context_ = nullptr;
    std::vector<CUdeviceptr> opened_;
    std::vector<CUmemGenericAllocationHandle> imported_;
    std::vector<Mapping> mappings_;
};

}  // namespace comm_core
