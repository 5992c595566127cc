// A test that data which one rank writes to a peer's memory, or reads from it, is right.
//
// Drivers have reported peer access that gave wrong data. So when a group connects, every rank stores a page of words
// in every rank's memory and loads a page from there, with the accesses that the kernels use. The words depend on a
// seed that the writer draws for this session, so that neither old memory nor another group's buffer passes.
//
// A rank's region for the test: one page stored by each rank, itself included; then one page for each rank with what
// this rank loaded from that rank's memory.
#pragma once

#include <comm_core/memory.cuh>

#include <cstdint>

#include "params.cuh"

namespace comm_customar_v1 {

constexpr uint32_t kTestPageNbytes = 4096;
constexpr uint32_t kTestPageWords = kTestPageNbytes / 4;
constexpr uint64_t kTestRegionNbytes = 2 * kMaxRanks * kTestPageNbytes;

// Word number `index` of the page of the rank that drew `seed`.
__host__ __device__ constexpr uint32_t test_word(uint32_t seed, uint32_t index) {
    // For each seed a bijection of `index`, so that swapped words are noticed. The multiplier is Knuth's, from the
    // golden ratio.
    const uint32_t mixed = (index + 1) * 2654435761u ^ seed;
    return (mixed ^ mixed >> 15) * 2654435761u;
}

// Offset in a region of the page that rank `writer` stored.
__host__ __device__ constexpr uint64_t stored_at(uint32_t writer) {
    return static_cast<uint64_t>(writer) * kTestPageNbytes;
}
// Offset in a region of the page that its owner loaded from rank `writer`.
__host__ __device__ constexpr uint64_t loaded_at(uint32_t writer) {
    return stored_at(kMaxRanks + writer);
}

struct PeerAccessTest {
    char* regions[kMaxRanks];  // by rank, as this device maps them
    uint32_t rank;
    uint32_t seed;
};

// One block for each rank written to.
static __global__ void write_test_pages(const __grid_constant__ PeerAccessTest test) {
    char* const page = test.regions[blockIdx.x] + stored_at(test.rank);
    for (uint32_t vec = threadIdx.x; vec < kTestPageWords / 4; vec += blockDim.x) {
        const uint32_t word = 4 * vec;
        comm_core::store_relaxed_sys(page + word * 4,
                                     Vec{test_word(test.seed, word),
                                         test_word(test.seed, word + 1),
                                         test_word(test.seed, word + 2),
                                         test_word(test.seed, word + 3)});
    }
}

// One block for each rank read from: loads the page that the rank stored in its own region. The host runs this after
// every rank's write_test_pages.
static __global__ void read_test_pages(const __grid_constant__ PeerAccessTest test) {
    const uint32_t writer = blockIdx.x;
    const char* const page = test.regions[writer] + stored_at(writer);
    char* const loaded = test.regions[test.rank] + loaded_at(writer);
    for (uint32_t vec = threadIdx.x; vec < kTestPageWords / 4; vec += blockDim.x) {
        comm_core::store(loaded + vec * 16, comm_core::load_relaxed_sys(page + vec * 16));
    }
}

// Counts the words of a page that differ from those of the writer's seed.
inline uint32_t wrong_words(const uint32_t* words, uint32_t seed) {
    uint32_t wrong = 0;
    for (uint32_t index = 0; index < kTestPageWords; ++index) wrong += words[index] != test_word(seed, index);
    return wrong;
}

}  // namespace comm_customar_v1
