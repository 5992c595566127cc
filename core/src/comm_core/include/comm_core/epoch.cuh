// The number of a launch, counted on the device, so that a replayed graph continues where the last launch ended.
#pragma once

#include <cstdint>

#include "pdl.cuh"

namespace comm_core {

// A launch adds 2^kEpochShift to the counter in total, so the upper bits count launches. A grid has at most so many
// blocks.
constexpr int kEpochShift = 20;
constexpr unsigned long long kOneEpoch = 1ull << kEpochShift;

// Returns the epoch of this launch, the same in all its blocks, and lets the next kernel start. All threads call it
// once, before anything else and before `wait_for_predecessors`.
//
// Block 0 adds 2^20 - (blocks - 1), and every other block adds 1. In any order of blocks, each finds the counter at or
// above epoch * 2^20 and below the next epoch. So one atomic operation for each block is enough, and no block waits for
// another.
//
// This is correct although the predecessor may still run: only these operations access the counter, and operations on
// one address happen one after another. The next launch has blocks only after every block of this one has called
// `launch_successor` or ended. Each calls it after `__syncthreads`, which the first thread reaches only after its
// operation has returned, since it stores the result. So all operations of this launch come before all of the next's.
// Nothing else is inferred from the counter: other kernels' writes are read after the wait.
__device__ __forceinline__ unsigned long long next_epoch(unsigned long long* counter) {
    __shared__ unsigned long long epoch;
    if (threadIdx.x == 0) {
        const unsigned long long share = blockIdx.x == 0 ? kOneEpoch - (gridDim.x - 1) : 1ull;
        // Relaxed, since only the order of operations on this one address matters. Not atomicAdd, for which the
        // compiler first combines threads that add to the same address.
        unsigned long long before;
        asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
                     : "=l"(before)
                     : "l"(counter), "l"(share)
                     : "memory");
        epoch = before >> kEpochShift;
    }
    __syncthreads();
    launch_successor();
    return epoch;
}

}  // namespace comm_core
