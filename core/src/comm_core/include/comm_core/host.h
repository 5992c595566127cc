// The host side of a session with kernels that wait for peers, for code that apache-tvm-ffi binds: checked CUDA calls,
// what kernels report of their waits, and the order of launches on several streams.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "vec.cuh"
#include "wait.cuh"

namespace comm_core {

inline void check(cudaError_t status, const char* call) {
    if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << call << ": " << cudaGetErrorString(status);
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

// Makes a device current, and restores the previous one at the end of the scope.
class OnDevice {
  public:
    explicit OnDevice(int device) : before_(current_device()) { check(cudaSetDevice(device), "cudaSetDevice"); }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_;
};

// Frees resources of CUDA, but not in a thread in which their device isn't current.
//
// The last reference to a session may be dropped in any thread, such as one in which Python's garbage collector happens
// to run. If that thread has chosen no device, CUDA would first create a context on device 0, which takes 500 MB there.
// So what is destroyed in such a thread waits until this library takes its next resource, on whichever device.
class DeferredFrees {
  public:
    static void free_or_defer(int device, std::function<void()> free) {
        int current = -1;
        if (cudaGetDevice(&current) == cudaSuccess && current == device) return free();
        const std::lock_guard lock(shared().mutex);
        shared().waiting.push_back(std::move(free));
    }

    // Frees what waits. The thread has chosen a device.
    static void run() {
        std::vector<std::function<void()>> waiting;
        {
            const std::lock_guard lock(shared().mutex);
            waiting.swap(shared().waiting);
        }
        for (const auto& free : waiting) free();
    }

  private:
    struct Shared {
        std::mutex mutex;
        std::vector<std::function<void()>> waiting;
    };

    static Shared& shared() {
        static Shared& never_destroyed = *new Shared;  // a destructor may run while the process ends
        return never_destroyed;
    }
};

// An array of zeros in host memory that is mapped on devices: kernels write it, and the host reads it meanwhile.
template <typename T>
class MappedArray {
  public:
    explicit MappedArray(size_t length) : device_(current_device()) {
        DeferredFrees::run();
        const size_t nbytes = length * sizeof(T);
        check(cudaHostAlloc(&values_, nbytes, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
        std::memset(values_, 0, nbytes);
        void* mapped = nullptr;
        const cudaError_t status = cudaHostGetDevicePointer(&mapped, values_, 0);
        if (status != cudaSuccess) cudaFreeHost(values_);
        check(status, "cudaHostGetDevicePointer");
        on_device_ = static_cast<T*>(mapped);
    }
    // Destroy it only once no kernel can write it any more.
    ~MappedArray() {
        DeferredFrees::free_or_defer(device_, [values = values_] { cudaFreeHost(values); });
    }
    MappedArray(const MappedArray&) = delete;
    MappedArray& operator=(const MappedArray&) = delete;

    // The array's address on the device that was current at its construction.
    T* on_device() const { return on_device_; }

    volatile T* on_host() const { return values_; }

  private:
    int device_;
    T* values_ = nullptr;
    T* on_device_ = nullptr;
};

// The error word of wait.cuh: 0, or 1 + the rank that didn't come in time with this rank's message. Destroy it only
// once no kernel can set it any more.
class ErrorWord {
  public:
    // The word's address on the device that was current at its construction.
    uint32_t* on_device() const { return word_.on_device(); }

    int64_t read() const { return *word_.on_host(); }

    // Ends every wait of kernels in flight, as a timeout would. `rank` is this rank.
    void abort(uint32_t rank) {
        volatile uint32_t* const word = word_.on_host();
        if (*word == 0) *word = rank + 1;
    }

  private:
    MappedArray<uint32_t> word_{1};
};

// The counts of wait.cuh, one for each rank. Destroy them only once no kernel can wait any more.
class WaitCounters {
  public:
    explicit WaitCounters(size_t world_size) : world_size_(world_size), counts_(world_size) {}

    // Their address on the device that was current at their construction.
    WaitCounts* on_device() const { return counts_.on_device(); }

    // Returns for each rank the number of waits for it, their total time and the longest one, in nanoseconds, as
    // comm_core.kernels.waits_by_rank takes them. While a kernel counts a wait, some of its numbers may be older than
    // others.
    std::vector<int64_t> read() const {
        std::vector<int64_t> numbers;
        for (size_t rank = 0; rank < world_size_; ++rank) {
            const volatile WaitCounts& counts = counts_.on_host()[rank];
            for (const uint64_t number : {counts.waits, counts.total_ns, counts.longest_ns})
                numbers.push_back(static_cast<int64_t>(number));
        }
        return numbers;
    }

  private:
    size_t world_size_;
    MappedArray<WaitCounts> counts_;
};

// Orders a session's launches on all streams one after another; launches that overlapped would take each other's
// epochs. Call `begin` before the launches of a call and `end` after them, with the session's device current. Captured
// launches are ordered within their capture alone: the caller orders replays.
//
// A stream may be destroyed after a call on it, and then its handle must not be used any more: the driver may give it
// to a new stream, and crash otherwise. So `end` records an event, by which later calls on other streams wait, and
// streams are compared by their IDs, which are never given twice. Only the legacy default stream lives as long as the
// device. Its event is recorded once it is needed, since a record takes 0.3 µs of the host's time.
class StreamOrder {
  public:
    StreamOrder() : device_(current_device()) {
        DeferredFrees::run();
        check(cudaEventCreateWithFlags(&called_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        const cudaError_t status = cudaEventCreateWithFlags(&captured_, cudaEventDisableTiming);
        if (status != cudaSuccess) cudaEventDestroy(called_);
        check(status, "cudaEventCreateWithFlags");
    }
    ~StreamOrder() {
        DeferredFrees::free_or_defer(device_, [called = called_, captured = captured_] {
            cudaEventDestroy(called);
            cudaEventDestroy(captured);
        });
    }
    StreamOrder(const StreamOrder&) = delete;
    StreamOrder& operator=(const StreamOrder&) = delete;

    // Orders the launches of a call on `stream` after those of the call before.
    void begin(cudaStream_t stream) {
        now_ = {};
        if (!is_default(stream)) {
            cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
            check(cudaStreamGetCaptureInfo(stream, &status, &now_.capture), "cudaStreamGetCaptureInfo");
            if (status == cudaStreamCaptureStatusNone) {
                now_.capture = 0;
                check(cudaStreamGetId(stream, &now_.stream), "cudaStreamGetId");
            } else {
                // A capturing stream can't be asked for its ID, and isn't destroyed before its capture ends.
                now_.stream = reinterpret_cast<uintptr_t>(stream);
            }
        }
        if (now_.capture != 0) {
            // Two branches of one graph.
            if (now_.capture == last_captured_.capture && now_.stream != last_captured_.stream) {
                check(cudaStreamWaitEvent(stream, captured_, 0), "cudaStreamWaitEvent");
            }
        } else if (used_ && now_.stream != last_called_.stream) {
            if (last_called_.stream == kDefault) check(cudaEventRecord(called_, cudaStreamLegacy), "cudaEventRecord");
            check(cudaStreamWaitEvent(stream, called_, 0), "cudaStreamWaitEvent");
        }
    }

    // Notes that the call that began last has been launched, on `stream`.
    void end(cudaStream_t stream) {
        if (now_.capture != 0) {
            check(cudaEventRecord(captured_, stream), "cudaEventRecord");
            last_captured_ = now_;
            return;
        }
        if (now_.stream != kDefault) check(cudaEventRecord(called_, stream), "cudaEventRecord");
        last_called_ = now_;
        used_ = true;
    }

  private:
    // Stands for the ID of the legacy default stream, which isn't asked for.
    static constexpr unsigned long long kDefault = ~0ull;

    struct Place {
        unsigned long long stream = kDefault;  // its ID; its handle in a capture
        unsigned long long capture = 0;        // its ID; 0: none
    };

    static bool is_default(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

    int device_;
    cudaEvent_t called_ = nullptr, captured_ = nullptr;
    Place now_, last_called_, last_captured_;
    bool used_ = false;
};

inline Element element_of(DLDataType dtype) {
    if (dtype.lanes == 1) {
        if (dtype.code == kDLFloat && dtype.bits == 32) return Element::kFloat32;
        if (dtype.code == kDLFloat && dtype.bits == 16) return Element::kFloat16;
        if (dtype.code == kDLBfloat && dtype.bits == 16) return Element::kBFloat16;
    }
    TVM_FFI_THROW(TypeError) << "expected float32, float16 or bfloat16; got a dtype of code "
                             << static_cast<int>(dtype.code) << " with " << static_cast<int>(dtype.bits) << " bits and "
                             << dtype.lanes << " lanes";
    return Element::kFloat32;
}

template <typename AnyTensor>
char* data_of(const AnyTensor& tensor) {
    return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
}

inline std::vector<int64_t> listed(const tvm::ffi::Array<int64_t>& values) {
    return {values.begin(), values.end()};
}

}  // namespace comm_core
