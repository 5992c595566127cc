// Barriers between the same block of every rank, over flags in each rank's memory that its peers write.
#pragma once

#include <cstdint>

#include "memory.cuh"
#include "wait.cuh"

namespace comm_core {

constexpr int kMaxRanks = 8;
// Lines of a block's own, so that blocks don't slow each other: three stages of a flag a rank, and room.
constexpr uint32_t kFlagLineNbytes = 256;
constexpr uint32_t kFlagStages = 3;

// Where rank `source` tells the owner of the flags at `base` that its block is at a stage.
__device__ __forceinline__ uint64_t* flag_of(char* base, uint32_t block, uint32_t stage, uint32_t source) {
    return reinterpret_cast<uint64_t*>(base + static_cast<size_t>(block) * kFlagLineNbytes) + stage * kMaxRanks +
           source;
}

// Returns when this block of every rank has come here. All threads call it; each rank's flags begin `at` bytes into its
// buffer, `epoch` is the launch's number, which a flag takes when its block arrives. Flags only grow, so nobody resets
// them; with 64 bits they never wrap, however long a block without launches keeps an old one.
//
// What any thread of any rank's block wrote before is visible to every thread of this block after: the first barrier
// brings the block's writes before the release store of the thread that tells, which is cumulative; the acquire load
// and the second barrier bring them before what follows here.
template <int W>
__device__ __forceinline__ void barrier(char* const* buffers,
                                        uint64_t at,
                                        uint32_t rank,
                                        uint32_t stage,
                                        uint64_t epoch,
                                        const Bound& bound,
                                        SpinGuard& guard) {
    __syncthreads();
    const uint32_t peer = threadIdx.x;
    if (peer < W && peer != rank) {
        store_release_sys(flag_of(buffers[peer] + at, blockIdx.x, stage, rank), epoch);
        const uint64_t* mine = flag_of(buffers[rank] + at, blockIdx.x, stage, peer);
        while (load_acquire_sys(mine) < epoch) {
            if (guard.expired(bound, peer)) break;
        }
    }
    __syncthreads();
}

}  // namespace comm_core
