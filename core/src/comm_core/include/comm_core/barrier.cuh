// Barriers between the same block of every rank, over flags in each rank's memory that its peers write.
#pragma once

#include <cstdint>

#include "epoch.cuh"
#include "memory.cuh"
#include "wait.cuh"

namespace comm_core {

constexpr int kMaxRanks = 8;
// Each block has cache lines of its own, so that blocks don't slow each other. They hold the flags of three stages, one
// for each rank, and padding.
constexpr uint32_t kFlagLineNbytes = 256;
constexpr uint32_t kFlagStages = 3;

// Returns the flag by which rank `source` signals that its block has reached a stage. `base` is where the flags of the
// rank that reads it begin.
__device__ __forceinline__ uint64_t* flag_of(char* base, uint32_t block, uint32_t stage, uint32_t source) {
    return reinterpret_cast<uint64_t*>(base + static_cast<size_t>(block) * kFlagLineNbytes) + stage * kMaxRanks +
           source;
}

// A message in as many bits as an epoch leaves in a flag: its size and element type, modulo a prime. Sizes that ranks
// come with by mistake, such as those of two shapes of a model, don't differ by a multiple of it.
constexpr uint32_t message_tag(uint64_t nbytes, uint32_t element) {
    return static_cast<uint32_t>((nbytes * 4 + element) % 1048573);
}
static_assert(1048573 < kOneEpoch);

// Returns when the same block of every rank has called it. All threads call it. Each rank's flags begin `at` bytes into
// its buffer. `epoch` is the launch's number and `tag` its message's; a flag takes this value, the epoch in its upper
// bits, when its block arrives. Flags only grow, so they are never reset; the epoch never wraps, even if many launches
// leave a block's flags unchanged.
//
// If a peer's tag differs, the wait ends like a timeout. A rank can't compare tags with a peer that is in a later
// launch already. But that peer has come there only by seeing this rank's flag of this launch, so it has compared them:
// of two ranks with different messages, at least one notices it. Block 0 is in every grid, so it compares even if the
// ranks' grids differ.
//
// A write before the barrier, by any thread of this block on any rank, is visible to every thread of the block after
// it: the first `__syncthreads` orders the block's writes before the release stores, which are cumulative; the acquire
// loads and the second `__syncthreads` order them before everything that follows.
template <int W>
__device__ __forceinline__ void barrier(char* const* buffers,
                                        uint64_t at,
                                        uint32_t rank,
                                        uint32_t stage,
                                        uint64_t epoch,
                                        uint32_t tag,
                                        const Bound& bound,
                                        SpinGuard& guard) {
    __syncthreads();
    const uint32_t peer = threadIdx.x;
    if (peer < W && peer != rank) {
        const uint64_t flag = epoch << kEpochShift | tag;
        store_release_sys(flag_of(buffers[peer] + at, blockIdx.x, stage, rank), flag);
        const uint64_t* mine = flag_of(buffers[rank] + at, blockIdx.x, stage, peer);
        uint64_t theirs = 0;
        guard.wait(bound, blockIdx.x == 0, [&](uint32_t& awaited) {
            awaited = peer;
            theirs = load_acquire_sys(mine);
            return theirs >> kEpochShift >= epoch;
        });
        if (theirs >> kEpochShift == epoch && theirs != flag) guard.give_up(bound, peer);
    }
    __syncthreads();
}

}  // namespace comm_core
