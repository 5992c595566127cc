// Lower bounds of an all-reduce's time: an empty kernel, a store to a peer, and a transfer over the links.

#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

namespace comm_core_limits {
namespace {

using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

// How long the kernel waits for its peer's stores, in nanoseconds: an absent rank must not hang the GPU.
constexpr uint64_t kTimeoutNs = 2'000'000'000;
// 264 blocks of 256 threads, each thread with eight 16-byte vectors in flight. This is two blocks for each
// multiprocessor of an H200, on which 264 blocks gave the highest bandwidth of remote stores among 64 to 528 blocks.
constexpr int kBlocks = 264;
constexpr int kThreads = 256;
constexpr int kVectors = 8;

void check(cudaError_t status) {
    if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(status);
}

cudaStream_t stream_of(TensorView tensor) {
    const DLDevice device = tensor.device();
    return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

__device__ uint64_t now_ns() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

// Relaxed is enough for both: the flag publishes no other data, and its reader reads nothing else of its peer's.
__device__ void store(uint32_t* address, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ uint32_t load(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__global__ void nothing() {}

// Plays ping-pong between two ranks: the first sends a number and waits until it comes back. `mine` and `theirs` hold
// the last number that was sent to this rank and to its peer. `sent`, in this rank's memory alone, is the last number
// of the launch before, from which the next launch continues, also in a replayed graph.
__global__ void bounce(uint32_t* mine, uint32_t* theirs, uint32_t* sent, bool first, int rounds) {
    const uint32_t before = *sent;
    const uint64_t start = now_ns();
    for (uint32_t round = before + 1; round <= before + rounds; ++round) {
        if (first) store(theirs, round);
        for (uint32_t polls = 1; load(mine) != round; ++polls) {
            if (polls % 1024 == 0 && now_ns() - start > kTimeoutNs) return;
        }
        if (!first) store(theirs, round);
    }
    *sent = before + rounds;
}

// Copies vectors to or from a peer's memory.
__global__ void __launch_bounds__(kThreads)
    move(uint4* __restrict__ to, const uint4* __restrict__ from, int64_t count) {
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += stride * kVectors) {
        uint4 vectors[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (at + i * stride < count) vectors[i] = from[at + i * stride];
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (at + i * stride < count) to[at + i * stride] = vectors[i];
        }
    }
}

// Allocates an output and launches an empty kernel: the least work of an out-of-place call.
Tensor launch(TensorView like) {
    Tensor out = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, like.shape(), like.dtype(), like.device());
    nothing<<<1, 32, 0, stream_of(like)>>>();
    check(cudaGetLastError());
    return out;
}

void hop(TensorView sent, int64_t mine, int64_t theirs, bool first, int64_t rounds) {
    bounce<<<1, 1, 0, stream_of(sent)>>>(reinterpret_cast<uint32_t*>(mine),
                                         reinterpret_cast<uint32_t*>(theirs),
                                         static_cast<uint32_t*>(sent.data_ptr()),
                                         first,
                                         static_cast<int>(rounds));
    check(cudaGetLastError());
}

// `like` gives only the device, and with it the stream.
void transfer(TensorView like, int64_t to, int64_t from, int64_t nbytes) {
    const int64_t count = (nbytes + 15) / 16;
    const int64_t needed = (count + kThreads - 1) / kThreads;
    const int blocks = static_cast<int>(needed < 1 ? 1 : needed < kBlocks ? needed : kBlocks);
    move<<<blocks, kThreads, 0, stream_of(like)>>>(
        reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(from), count);
    check(cudaGetLastError());
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(launch, launch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hop, hop);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(transfer, transfer);

}  // namespace
}  // namespace comm_core_limits
