// A thread's place in the grid.
#pragma once

#include <cstdint>

namespace comm_core {

// Consecutive warps go to different blocks, so that what doesn't fill the grid is spread over all of it; a warp's
// threads have consecutive places.
__device__ __forceinline__ uint32_t thread_in_grid() {
    return (blockIdx.x + gridDim.x * (threadIdx.x / 32)) * 32 + threadIdx.x % 32;
}

__device__ __forceinline__ uint32_t threads_in_grid() {
    return gridDim.x * blockDim.x;
}

}  // namespace comm_core
