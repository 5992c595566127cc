// The number of a launch, counted on the device, so that a replayed graph goes on where the last launch ended.
#pragma once

#include <cstdint>

#include "pdl.cuh"

namespace comm_core {

// A launch adds up to this, whatever its grid, which has at most so many blocks: the upper bits count launches.
constexpr int kEpochShift = 20;
constexpr unsigned long long kOneEpoch = 1ull << kEpochShift;

// The epoch of this launch, the same in all its blocks; then lets the next kernel start. All threads call it, once,
// first of all, before `wait_for_predecessors`.
//
// Block 0 adds 2^20 - (blocks - 1) and every other block 1. In whatever order they come, each finds the counter at or
// above epoch * 2^20 and below the next epoch, so that one atomic operation a block is all; no block waits for another.
//
// Why it is right without having waited for the predecessor, which may still run: only these operations touch the
// counter, and those on one address happen one after the other. The blocks of the next launch exist only after every
// block of this one has called `launch_successor` or ended, and each calls it after the barrier, which the first thread
// reaches only with its operation's result in hand (it stores it). So all of this launch's operations come before all
// of the next's. Nothing else is inferred from the counter: what other kernels wrote is read after the wait.
__device__ __forceinline__ unsigned long long next_epoch(unsigned long long* counter) {
    __shared__ unsigned long long epoch;
    if (threadIdx.x == 0) {
        const unsigned long long share = blockIdx.x == 0 ? kOneEpoch - (gridDim.x - 1) : 1ull;
        // Relaxed: its place among the operations on this one address is all that counts. Not atomicAdd, which would
        // first look for other threads that add to the same address.
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
