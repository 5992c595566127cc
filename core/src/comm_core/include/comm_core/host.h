// The host's side of a session whose kernels wait for peers, in code that apache-tvm-ffi binds: calls that are checked,
// the word by which kernels say that they gave up, and the order of launches on several streams.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <vector>

#include "vec.cuh"

namespace comm_core {

inline void check(cudaError_t status, const char* call) {
    if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << call << ": " << cudaGetErrorString(status);
}

// Makes a device current, and the one before again.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

// The word of wait.cuh, in host memory that devices see: 0, or 1 + the rank that a kernel waited for in vain.
class ErrorWord {
  public:
    ErrorWord() {
        check(cudaHostAlloc(&word_, sizeof *word_, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
        *word_ = 0;
        void* seen = nullptr;
        const cudaError_t status = cudaHostGetDevicePointer(&seen, word_, 0);
        if (status != cudaSuccess) cudaFreeHost(word_);
        check(status, "cudaHostGetDevicePointer");
        on_device_ = static_cast<uint32_t*>(seen);
    }
    // Only once no kernel can set it any more.
    ~ErrorWord() { cudaFreeHost(word_); }
    ErrorWord(const ErrorWord&) = delete;
    ErrorWord& operator=(const ErrorWord&) = delete;

    // As the device sees it that was current when it was made.
    uint32_t* on_device() const { return on_device_; }

    int64_t read() const { return *static_cast<volatile uint32_t*>(word_); }

    // Ends every wait of kernels in flight, as if this rank's peer hadn't come.
    void abort(uint32_t rank) {
        auto* const word = static_cast<volatile uint32_t*>(word_);
        if (*word == 0) *word = rank + 1;
    }

  private:
    uint32_t* word_ = nullptr;
    uint32_t* on_device_ = nullptr;
};

// Orders a session's launches after each other, whichever streams they are on; launches that overlapped would take each
// other's epochs. While a stream captures nothing can be ordered after what runs outside: replays are the caller's to
// order, as are streams that end while calls on them run.
class StreamOrder {
  public:
    StreamOrder() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
    ~StreamOrder() { cudaEventDestroy(event_); }
    StreamOrder(const StreamOrder&) = delete;
    StreamOrder& operator=(const StreamOrder&) = delete;

    // Call it before each launch, with its stream; the session's device is current.
    void follow(cudaStream_t stream) {
        if (stream == last_ && used_) return;
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
        if (status != cudaStreamCaptureStatusNone) return;
        if (used_) {
            // An event of a stream that captures by now would draw this stream into the graph.
            check(cudaStreamIsCapturing(last_, &status), "cudaStreamIsCapturing");
            if (status != cudaStreamCaptureStatusNone) {
                TVM_FFI_THROW(ValueError) << "the stream of the call before captures, so that a call on another can't "
                                             "be ordered after it";
            }
            check(cudaEventRecord(event_, last_), "cudaEventRecord");
            check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
        }
        last_ = stream;
        used_ = true;
    }

  private:
    cudaEvent_t event_ = nullptr;
    cudaStream_t last_ = nullptr;
    bool used_ = false;
};

inline Element element_of(DLDataType dtype) {
    if (dtype.lanes == 1) {
        if (dtype.code == kDLFloat && dtype.bits == 32) return Element::kFloat32;
        if (dtype.code == kDLFloat && dtype.bits == 16) return Element::kFloat16;
        if (dtype.code == kDLBfloat && dtype.bits == 16) return Element::kBFloat16;
    }
    TVM_FFI_THROW(TypeError) << "float32, float16 and bfloat16 are summed, not this dtype";
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
