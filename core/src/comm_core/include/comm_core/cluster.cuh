// What the threads of a warp do together, and the blocks of a cluster, which reach into each other's shared memory.
//
// A cluster is what the launch makes of its blocks, along x alone. Where it makes none, and on devices before sm_90,
// each block is a cluster of one; then there are no gates
// and nothing is posted.
#pragma once

#include <cstdint>

namespace comm_core {

__device__ __forceinline__ uint32_t blocks_in_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t count;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
    return count;
#else
    return 1;
#endif
}

// This block's number in its cluster.
__device__ __forceinline__ uint32_t block_in_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t number;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(number));
    return number;
#else
    return 0;
#endif
}

// This cluster's number in the grid, and how many there are.
__device__ __forceinline__ uint32_t cluster_in_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t number;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
    return number;
#else
    return blockIdx.x;
#endif
}

__device__ __forceinline__ uint32_t clusters_in_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t count;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return count;
#else
    return gridDim.x;
#endif
}

// The sum over a warp, the same bits in every lane: each step adds two numbers, in whatever order.
__device__ __forceinline__ float warp_sum(float number) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) number += __shfl_xor_sync(0xffffffffu, number, mask);
    return number;
}

// `count` numbers in this block's shared memory, aligned to 16 bytes; the same in every call with that count.
template <uint32_t count>
__device__ __forceinline__ float* shared_numbers() {
    __shared__ __align__(16) float numbers[count];
    return numbers;
}

// What counts the bytes that the cluster's blocks post to one of them: an mbarrier in its shared memory. A gate opens
// once it expects bytes and so many have come, in whatever order; then it counts anew. Waits tell its openings apart by
// their parity, from 0.
struct Gate {
    uint64_t word;
};

template <uint32_t count>
__device__ __forceinline__ Gate* shared_gates() {
    __shared__ Gate gates[count];
    return gates;
}

__device__ __forceinline__ uint32_t shared_address(const void* place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// One thread a block, for each gate; then all threads of the cluster through its barrier, before anybody else's turn.
__device__ __forceinline__ void set_up(Gate* gate) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(gate)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// The cluster's barrier, in two halves, for all threads of all its blocks. It orders the gates' setting up and nothing
// else: at release order the first half would be a fence for all of the device. "Aligned" asks for whole warps.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// One thread, for each opening of its block's gate.
__device__ __forceinline__ void expect(Gate* gate, uint32_t nbytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(gate)), "r"(nbytes)
                 : "memory");
#endif
}

// A number, its four bytes counted by the gate: both in another block's shared memory, where they are in this block's.
// No fence is needed: the count comes after the number, and at release order.
__device__ __forceinline__ void post(float* place, Gate* gate, uint32_t block, float number) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .u32 there, counted;\n\t"
        "mapa.shared::cluster.u32 there, %0, %2;\n\t"
        "mapa.shared::cluster.u32 counted, %1, %2;\n\t"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [counted]; }" ::"r"(
            shared_address(place)),
        "r"(shared_address(gate)),
        "r"(block),
        "f"(number)
        : "memory");
#endif
}

// Returns once the block's gate has opened; what was posted by then is visible.
__device__ __forceinline__ void pass(Gate* gate, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t open = 0;
    while (open == 0) {
        asm volatile(
            "{ .reg .pred passed;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 passed, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, passed; }"
            : "=r"(open)
            : "r"(shared_address(gate)), "r"(parity)
            : "memory");
    }
#endif
}

}  // namespace comm_core
