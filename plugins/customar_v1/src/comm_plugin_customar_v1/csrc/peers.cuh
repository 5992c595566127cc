// Every rank's buffer as this rank maps it: its own allocated by the driver, the others' opened by CUDA IPC handles.
//
// Not from torch's allocator: its tensors may be parts of larger allocations, and with `expandable_segments` their
// memory has no IPC handle.
#pragma once

#include <comm_core/host.h>

#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "peer_access_test.cuh"

namespace comm_customar_v1 {

using comm_core::check;
using comm_core::OnDevice;

struct FreeDevice {
    void operator()(char* memory) const { cudaFree(memory); }
};
struct DestroyStream {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream>;

// A stream that doesn't synchronise with the legacy default stream.
inline Stream new_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return Stream(stream);
}

// Its destructor frees nothing, since kernels may still run and peers still read. The caller uses `unmap` and `free`
// once it knows that they don't.
class Peers {
  public:
    // Flags begin at 0 and the first epoch is 1, so that no flag seems to be set.
    Peers(uint32_t rank, uint32_t world_size, uint64_t nbytes) : rank_(rank), buffers_(world_size) {
        void* memory = nullptr;
        check(cudaMalloc(&memory, nbytes), "cudaMalloc");
        std::unique_ptr<char, FreeDevice> mine(static_cast<char*>(memory));
        const Stream stream = new_stream();
        const unsigned long long first = comm_core::kOneEpoch;
        check(cudaMemsetAsync(memory, 0, nbytes, stream.get()), "cudaMemsetAsync");
        check(cudaMemcpyAsync(memory, &first, sizeof first, cudaMemcpyHostToDevice, stream.get()), "cudaMemcpyAsync");
        check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
        check(cudaIpcGetMemHandle(&handle_, memory), "cudaIpcGetMemHandle");
        buffers_[rank_] = mine.release();
    }
    Peers(const Peers&) = delete;
    Peers& operator=(const Peers&) = delete;

    // The handle by which peers open this rank's buffer.
    std::string ipc_handle() const { return {handle_.reserved, sizeof handle_.reserved}; }

    // Opens each peer's buffer once. If one can't be opened, those before it stay open until `unmap`.
    void open(const std::vector<std::string>& handles) {
        if (handles.size() != buffers_.size()) {
            TVM_FFI_THROW(ValueError) << "there are " << handles.size() << " handles for " << buffers_.size()
                                      << " ranks";
        }
        for (size_t peer = 0; peer < handles.size(); ++peer) {
            if (buffers_[peer] != nullptr) continue;
            cudaIpcMemHandle_t handle;
            if (handles[peer].size() != sizeof handle.reserved) {
                TVM_FFI_THROW(ValueError) << "rank " << peer << "'s handle has " << handles[peer].size()
                                          << " bytes, not " << sizeof handle.reserved;
            }
            std::memcpy(handle.reserved, handles[peer].data(), sizeof handle.reserved);
            void* memory = nullptr;
            const cudaError_t status = cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
            if (status != cudaSuccess) {
                TVM_FFI_THROW(RuntimeError) << "the buffer of rank " << peer
                                            << " can't be opened: cudaIpcOpenMemHandle: " << cudaGetErrorString(status);
            }
            buffers_[peer] = static_cast<char*>(memory);
        }
    }

    // By rank; null for a buffer that isn't open.
    const std::vector<char*>& buffers() const { return buffers_; }

    // Unmaps every peer's buffer; throws after the last one if one of them couldn't be unmapped.
    void unmap() {
        cudaError_t status = cudaSuccess;
        for (size_t peer = 0; peer < buffers_.size(); ++peer) {
            if (peer == rank_ || buffers_[peer] == nullptr) continue;
            const cudaError_t closed = cudaIpcCloseMemHandle(buffers_[peer]);
            if (status == cudaSuccess) status = closed;
            buffers_[peer] = nullptr;
        }
        check(status, "cudaIpcCloseMemHandle");
    }

    // Frees this rank's buffer; no peer may have it open any more.
    void free() {
        char* const mine = buffers_[rank_];
        buffers_[rank_] = nullptr;
        check(cudaFree(mine), "cudaFree");
    }

    // Writes this rank's page to every rank, and returns when it has arrived.
    void write_test_pages(uint64_t test_at, uint32_t seed) const {
        run_test(reinterpret_cast<const void*>(&comm_customar_v1::write_test_pages), test_at, seed);
    }

    // Loads every rank's page from its memory; compares these pages, and those that the peers stored here, with the
    // ranks' seeds. Returns "" if all words are right, else what is wrong.
    std::string read_test_pages(uint64_t test_at, const std::vector<int64_t>& seeds) const {
        run_test(reinterpret_cast<const void*>(&comm_customar_v1::read_test_pages), test_at, 0);
        std::vector<uint32_t> words(kTestRegionNbytes / sizeof(uint32_t));
        const Stream stream = new_stream();
        check(cudaMemcpyAsync(
                  words.data(), buffers_[rank_] + test_at, kTestRegionNbytes, cudaMemcpyDeviceToHost, stream.get()),
              "cudaMemcpyAsync");
        check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
        for (uint32_t writer = 0; writer < buffers_.size(); ++writer) {
            const auto seed = static_cast<uint32_t>(seeds.at(writer));
            const uint32_t stored = wrong_words(words.data() + stored_at(writer) / sizeof(uint32_t), seed);
            const uint32_t loaded = wrong_words(words.data() + loaded_at(writer) / sizeof(uint32_t), seed);
            const std::string of = " of " + std::to_string(kTestPageWords) + " words ";
            const std::string rank = "rank " + std::to_string(writer);
            if (stored != 0) return std::to_string(stored) + of + "that " + rank + " stored here are wrong";
            if (loaded != 0) return std::to_string(loaded) + of + "loaded from " + rank + "'s memory are wrong";
        }
        return "";
    }

  private:
    void run_test(const void* kernel, uint64_t test_at, uint32_t seed) const {
        PeerAccessTest test{};
        test.rank = rank_;
        test.seed = seed;
        for (size_t peer = 0; peer < buffers_.size(); ++peer) test.regions[peer] = buffers_[peer] + test_at;
        const Stream stream = new_stream();
        void* arguments[] = {&test};
        const dim3 blocks(static_cast<unsigned int>(buffers_.size())), threads(128);
        check(cudaLaunchKernel(kernel, blocks, threads, arguments, 0, stream.get()), "cudaLaunchKernel");
        check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    }

    uint32_t rank_;
    std::vector<char*> buffers_;
    cudaIpcMemHandle_t handle_{};
};

}  // namespace comm_customar_v1
