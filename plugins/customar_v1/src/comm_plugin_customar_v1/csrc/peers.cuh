// Every rank's buffer as this rank has it: its own straight from the driver, the others' opened by CUDA IPC handles.
//
// Not from torch's allocator: what that hands out may be a part of something larger, and under `expandable_segments` is
// memory that has no IPC handle.
#pragma once

#include <comm_core/host.h>

#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "letters.cuh"

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

// Neither waits for the legacy default stream nor holds it up.
inline Stream new_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return Stream(stream);
}

// Gives nothing back by itself, since kernels may still run and peers still read: `unmap` and `free` are for who knows
// that they don't.
class Peers {
  public:
    // Flags begin at 0 and the first epoch is 1, so that no flag is taken for set.
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

    // What the peers open.
    std::string handle() const { return {handle_.reserved, sizeof handle_.reserved}; }

    // Opens each peer's buffer, once; where one can't be, those before it stay open until `unmap`.
    void open(const std::vector<std::string>& handles) {
        if (handles.size() != buffers_.size()) {
            TVM_FFI_THROW(ValueError) << handles.size() << " handles of " << buffers_.size() << " ranks";
        }
        for (size_t peer = 0; peer < handles.size(); ++peer) {
            if (buffers_[peer] != nullptr) continue;
            cudaIpcMemHandle_t handle;
            if (handles[peer].size() != sizeof handle.reserved) {
                TVM_FFI_THROW(ValueError) << "a handle of " << handles[peer].size() << " bytes from rank " << peer;
            }
            std::memcpy(handle.reserved, handles[peer].data(), sizeof handle.reserved);
            void* memory = nullptr;
            const cudaError_t status = cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess);
            if (status != cudaSuccess) {
                TVM_FFI_THROW(RuntimeError) << "the memory of rank " << peer
                                            << " can't be opened: cudaIpcOpenMemHandle: " << cudaGetErrorString(status);
            }
            buffers_[peer] = static_cast<char*>(memory);
        }
    }

    // By rank; null where it isn't open.
    const std::vector<char*>& buffers() const { return buffers_; }

    // Lets go of every peer's buffer, also where one of them can't be let go.
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

    // Gives this rank's buffer back; no peer has it open any more.
    void free() {
        char* const mine = buffers_[rank_];
        buffers_[rank_] = nullptr;
        check(cudaFree(mine), "cudaFree");
    }

    // Writes this rank's letter to every rank, and returns once it is there.
    void write(uint64_t letters_at, uint32_t number) const {
        send(reinterpret_cast<const void*>(&write_letters), letters_at, number);
    }

    // Loads every rank's letter from its memory, and judges those as well as what the peers wrote here. `numbers`: what
    // each rank made up. "" where all is right.
    std::string read(uint64_t letters_at, const std::vector<int64_t>& numbers) const {
        send(reinterpret_cast<const void*>(&read_letters), letters_at, 0);
        std::vector<uint32_t> words(kLettersNbytes / sizeof(uint32_t));
        const Stream stream = new_stream();
        check(cudaMemcpyAsync(
                  words.data(), buffers_[rank_] + letters_at, kLettersNbytes, cudaMemcpyDeviceToHost, stream.get()),
              "cudaMemcpyAsync");
        check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
        for (uint32_t writer = 0; writer < buffers_.size(); ++writer) {
            const auto number = static_cast<uint32_t>(numbers.at(writer));
            const uint32_t stored = wrong_words(words.data() + letter_at(writer) / sizeof(uint32_t), number);
            const uint32_t loaded = wrong_words(words.data() + answer_at(writer) / sizeof(uint32_t), number);
            const std::string of = " of " + std::to_string(kLetterWords) + " words ";
            const std::string whose = "rank " + std::to_string(writer);
            if (stored != 0) return std::to_string(stored) + of + "that " + whose + " stored here are wrong";
            if (loaded != 0) return std::to_string(loaded) + of + "loaded from " + whose + "'s memory are wrong";
        }
        return "";
    }

  private:
    void send(const void* kernel, uint64_t letters_at, uint32_t number) const {
        Mail mail{};
        mail.rank = rank_;
        mail.number = number;
        for (size_t peer = 0; peer < buffers_.size(); ++peer) mail.letters[peer] = buffers_[peer] + letters_at;
        const Stream stream = new_stream();
        void* arguments[] = {&mail};
        const dim3 blocks(static_cast<unsigned int>(buffers_.size())), threads(128);
        check(cudaLaunchKernel(kernel, blocks, threads, arguments, 0, stream.get()), "cudaLaunchKernel");
        check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    }

    uint32_t rank_;
    std::vector<char*> buffers_;
    cudaIpcMemHandle_t handle_{};
};

}  // namespace comm_customar_v1
