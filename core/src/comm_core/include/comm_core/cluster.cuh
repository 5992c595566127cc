// Sums over a warp, and messages between the blocks of a cluster through each other's shared memory.
//
// The launch groups blocks into clusters, along x only. In a launch without clusters, and on devices before sm_90, each
// block is a cluster of one, and neither gates nor posts are used.
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

// This block's index in its cluster.
__device__ __forceinline__ uint32_t block_in_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t number;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(number));
    return number;
#else
    return 0;
#endif
}

// This cluster's index in the grid, and the number of clusters.
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

// Sums over a warp, with the same bits in every lane: each step adds two numbers, and that addition is commutative.
__device__ __forceinline__ float warp_sum(float number) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) number += __shfl_xor_sync(0xffffffffu, number, mask);
    return number;
}

// Takes the largest of numbers that aren't negative, over each `kLanes` consecutive lanes of a warp, a power of two. A
// NaN doesn't count.
template <int kLanes = 32>
__device__ __forceinline__ float warp_max(float number) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) number = fmaxf(number, __shfl_xor_sync(0xffffffffu, number, mask));
    return number;
}

// Returns `count` numbers in this block's shared memory, aligned to 16 bytes: the same ones for every call with that
// count.
template <uint32_t count>
__device__ __forceinline__ float* shared_numbers() {
    __shared__ __align__(16) float numbers[count];
    return numbers;
}

// An mbarrier in a block's shared memory. It counts the bytes that the cluster's blocks post to this block. The gate
// opens once a number of bytes is expected and as many have arrived, in either order; then it counts from zero again.
// Waits distinguish its openings by their parity, which begins at 0.
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

// Initialises a gate. One thread of the block calls it; then all threads of the cluster pass the cluster's barrier
// before any of them uses the gate.
__device__ __forceinline__ void set_up(Gate* gate) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(gate)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// The cluster's barrier, in two halves, for all threads of all its blocks. The first half is relaxed, because with
// release order it would be a fence for the whole device; so the barrier orders only the gates' initialisation, which
// has a fence of its own. "Aligned" requires whole warps.
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

// Makes a gate expect bytes. One thread of the gate's block calls it, once for each opening.
__device__ __forceinline__ void expect(Gate* gate, uint32_t nbytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(gate)), "r"(nbytes)
                 : "memory");
#endif
}

// Stores a number into another block of the cluster, whose gate counts its four bytes. `place` and `gate` are addresses
// in this block's shared memory, and the store goes to the same addresses in the other block's. No fence is needed: the
// gate counts the bytes after the number is stored, with release order.
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

// Returns once this block's gate has opened; the numbers that it counted are then visible.
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
