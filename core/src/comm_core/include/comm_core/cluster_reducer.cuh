// Sums and maxima over all threads of a cluster (cluster.cuh), often a single block. A result's bits don't depend on
// the cluster's shape.
#pragma once

#include "cluster.cuh"

namespace comm_core {

// The most numbers of a sum.
constexpr uint32_t kMaxReducerNumbers = 64;

// How a reduction combines numbers; 0 changes no result.
struct Addition {
    static __device__ __forceinline__ float over_warp(float number) { return warp_sum(number); }
    static __device__ __forceinline__ float of(float one, float other) { return one + other; }
};

struct Maximum {
    static __device__ __forceinline__ float over_warp(float number) { return warp_max(number); }
    static __device__ __forceinline__ float of(float one, float other) { return fmaxf(one, other); }
};

// Takes sums over a cluster, or maxima. Every block has a buffer of numbers in its shared memory. Each warp posts its
// numbers to the buffers of all blocks, and each block adds up its own buffer once all numbers of a sum have arrived.
//
// A block has two buffers, which consecutive sums use in turn, so a warp needn't wait until a buffer has been read: a
// warp that posts to a buffer again has passed the gate of the sum in between. That gate opened only after every warp
// with numbers had posted to it. Before such a post, a warp had read the sum before and, if it is the first of its
// block, had made its block's gate expect the sum in between. Warps without numbers neither wait nor read, and no warp
// posts to blocks without numbers, since these may have ended. A block with numbers ends after it has passed its last
// gate, and no post to it comes after that.
//
// `kSums` is the most sums that are taken together.
template <uint32_t kSums = 1>
class ClusterReducer {
  public:
    // All threads call it, before anything else.
    __device__ __forceinline__ ClusterReducer()
        : buffers_(shared_numbers<2 * kSums * kMaxReducerNumbers>()),
          gates_(shared_gates<2>()),
          blocks_(blocks_in_cluster()) {
        if (blocks_ == 1) return;
        if (threadIdx.x == 0) {
            set_up(gates_);
            set_up(gates_ + 1);
        }
        cluster_arrive();
    }

    // Waits until every block of the cluster has started. All threads call it once, before the first sum.
    __device__ __forceinline__ void open() const {
        if (blocks_ > 1) cluster_wait();
    }

    // Takes N sums of `count` numbers each; a number is the sum of one term from each lane of a warp. A thread gives V
    // terms to each sum: with w its warp's index in the cluster, and c the cluster's number of warps, they belong to
    // the numbers w, w + c, w + 2 c and so on. Terms of numbers from `count` on are left out. All threads call it, with
    // the same `count` every time. The threads of warps that have a number get the sums.
    //
    // The index of a number alone decides which terms it sums and where it is added, so a sum's bits don't depend on
    // how its terms are spread over blocks, warps and a thread's V terms, or on the other sums.
    template <int N, int V>
    __device__ __forceinline__ void sum(const float (&terms)[N][V], float (&totals)[N], uint32_t count) {
        reduce<Addition>(terms, totals, count);
    }

    // Takes N maxima of terms that aren't negative, as `sum` takes sums; a NaN doesn't count.
    template <int N, int V>
    __device__ __forceinline__ void max(const float (&terms)[N][V], float (&totals)[N], uint32_t count) {
        reduce<Maximum>(terms, totals, count);
    }

  private:
    template <typename Operation, int N, int V>
    __device__ __forceinline__ void reduce(const float (&terms)[N][V], float (&totals)[N], uint32_t count) {
        static_assert(N <= kSums, "the buffers have room for fewer sums");
        const uint32_t turn = turns_ % 2, parity = turns_ / 2 % 2;
        ++turns_;
        float* const buffer = buffers_ + turn * kSums * kMaxReducerNumbers;
        const uint32_t warps = blockDim.x / 32, lane = threadIdx.x % 32;
        const uint32_t first = block_in_cluster() * warps + threadIdx.x / 32;
        float sums[N][V];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            totals[n] = 0.0f;
#pragma unroll
            for (int j = 0; j < V; ++j) sums[n][j] = Operation::over_warp(terms[n][j]);
        }
        if (blocks_ == 1) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    if (lane == 0 && first + j * warps < count)
                        buffer[n * kMaxReducerNumbers + first + j * warps] = sums[n][j];
                }
            }
            __syncthreads();
        } else {
            if (first >= count) return;
            Gate* const gate = gates_ + turn;
            if (threadIdx.x == 0) expect(gate, N * count * sizeof(float));
            // Lane i posts to block i, if that block has numbers.
            const bool posts = lane < blocks_ && lane * warps < count;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t number = first + j * blocks_ * warps;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    if (posts && number < count) post(buffer + n * kMaxReducerNumbers + number, gate, lane, sums[n][j]);
                }
            }
            pass(gate, parity);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) totals[n] = total<Operation>(buffer + n * kMaxReducerNumbers, count);
    }

    template <typename Operation>
    static __device__ __forceinline__ float total(const float* buffer, uint32_t count) {
        float sums[4] = {};
        // In batches, so that loads are issued together.
        for (uint32_t place = 0; place < count; place += 16) {
            float4 batch[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) batch[k] = *reinterpret_cast<const float4*>(buffer + place + 4 * k);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float numbers[4] = {batch[k].x, batch[k].y, batch[k].z, batch[k].w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[i] = Operation::of(sums[i], place + 4 * k + i < count ? numbers[i] : 0.0f);
            }
        }
        return Operation::of(Operation::of(sums[0], sums[1]), Operation::of(sums[2], sums[3]));
    }

    float* buffers_;
    Gate* gates_;
    uint32_t blocks_;
    uint32_t turns_ = 0;
};

}  // namespace comm_core
