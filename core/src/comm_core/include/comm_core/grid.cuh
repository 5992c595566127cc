// A thread's index in the grid.
#pragma once

#include <cstdint>

namespace comm_core {

// Consecutive warps are in different blocks, so that work that doesn't fill the grid is spread over all blocks. The
// threads of a warp have consecutive indices.
__device__ __forceinline__ uint32_t thread_in_grid() {
    return (blockIdx.x + gridDim.x * (threadIdx.x / 32)) * 32 + threadIdx.x % 32;
}

__device__ __forceinline__ uint32_t threads_in_grid() {
    return gridDim.x * blockDim.x;
}

}  // namespace comm_core
