// The host's side of the peer-access test: launches its kernels and compares what they read.
#pragma once

#include <comm_core/host.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "peer_access_test.cuh"

namespace comm_customar_v1 {

using comm_core::check;

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

// Launches a kernel of the test with a block for each rank, and returns when it has ended.
inline void run_test(const void* kernel, PeerAccessTest test, uint32_t world_size) {
    const Stream stream = new_stream();
    void* arguments[] = {&test};
    check(cudaLaunchKernel(kernel, dim3(world_size), dim3(128), arguments, 0, stream.get()), "cudaLaunchKernel");
    check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
}

// Writes this rank's page to every rank, and returns when it has arrived.
inline void run_write_test_pages(const PeerAccessTest& test, uint32_t world_size) {
    run_test(reinterpret_cast<const void*>(&write_test_pages), test, world_size);
}

// Loads every rank's page from its memory; compares these pages, and those that the peers stored here, with the ranks'
// seeds. Returns "" if all words are right, else what is wrong.
inline std::string run_read_test_pages(const PeerAccessTest& test, const std::vector<int64_t>& seeds) {
    run_test(reinterpret_cast<const void*>(&read_test_pages), test, static_cast<uint32_t>(seeds.size()));
    std::vector<uint32_t> words(kTestRegionNbytes / sizeof(uint32_t));
    const Stream stream = new_stream();
    check(
        cudaMemcpyAsync(words.data(), test.regions[test.rank], kTestRegionNbytes, cudaMemcpyDeviceToHost, stream.get()),
        "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    for (uint32_t writer = 0; writer < seeds.size(); ++writer) {
        const auto seed = static_cast<uint32_t>(seeds[writer]);
        const uint32_t stored = wrong_words(words.data() + stored_at(writer) / sizeof(uint32_t), seed);
        const uint32_t loaded = wrong_words(words.data() + loaded_at(writer) / sizeof(uint32_t), seed);
        const std::string of = " of " + std::to_string(kTestPageWords) + " words ";
        const std::string rank = "rank " + std::to_string(writer);
        if (stored != 0) return std::to_string(stored) + of + "that " + rank + " stored here are wrong";
        if (loaded != 0) return std::to_string(loaded) + of + "loaded from " + rank + "'s memory are wrong";
    }
    return "";
}

}  // namespace comm_customar_v1
