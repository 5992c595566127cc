// The host side of a session with kernels that wait for peers, for code that apache-tvm-ffi binds: checked CUDA calls,
// the word by which kernels report a timeout, and the order of launches on several streams.
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

// Makes a device current, and restores the previous one at the end of the scope.
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

// The error word of wait.cuh, in host memory that is mapped on devices: 0, or 1 + the rank that didn't come in time
// with this rank's message.
class ErrorWord {
  public:
    ErrorWord() {
        check(cudaHostAlloc(&word_, sizeof *word_, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
        *word_ = 0;
        void* mapped = nullptr;
        const cudaError_t status = cudaHostGetDevicePointer(&mapped, word_, 0);
        if (status != cudaSuccess) cudaFreeHost(word_);
        check(status, "cudaHostGetDevicePointer");
        on_device_ = static_cast<uint32_t*>(mapped);
    }
    // Destroy it only once no kernel can set it any more.
    ~ErrorWord() { cudaFreeHost(word_); }
    ErrorWord(const ErrorWord&) = delete;
    ErrorWord& operator=(const ErrorWord&) = delete;

    // The word's address on the device that was current at its construction.
    uint32_t* on_device() const { return on_device_; }

    int64_t read() const { return *static_cast<volatile uint32_t*>(word_); }

    // Ends every wait of kernels in flight, as a timeout would. `rank` is this rank.
    void abort(uint32_t rank) {
        auto* const word = static_cast<volatile uint32_t*>(word_);
        if (*word == 0) *word = rank + 1;
    }

  private:
    uint32_t* word_ = nullptr;
    uint32_t* on_device_ = nullptr;
};

// Orders a session's launches on all streams one after another; launches that overlapped would take each other's
// epochs. A launch on a capturing stream isn't ordered after launches outside the capture: the caller orders replays.
// The caller must also keep a stream until the calls on it have ended.
class StreamOrder {
  public:
    StreamOrder() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
    ~StreamOrder() { cudaEventDestroy(event_); }
    StreamOrder(const StreamOrder&) = delete;
    StreamOrder& operator=(const StreamOrder&) = delete;

    // Orders the next launch, on `stream`, after the one before. The session's device must be current.
    void follow(cudaStream_t stream) {
        if (stream == last_ && used_) return;
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
        if (status != cudaStreamCaptureStatusNone) return;
        if (used_) {
            // If the last stream is capturing by now, its event would draw this stream into its graph.
            check(cudaStreamIsCapturing(last_, &status), "cudaStreamIsCapturing");
            if (status != cudaStreamCaptureStatusNone) {
                TVM_FFI_THROW(ValueError) << "the last call's stream is being captured, so this call, on another "
                                             "stream, can't be ordered after it; make it after the capture";
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
