// Sums over all threads of a cluster (cluster.cuh), often a single block, whose bits don't depend on its shape.
#pragma once

#include "cluster.cuh"

namespace comm_core {

// Numbers of a sum, at most.
constexpr uint32_t kMaxReducerNumbers = 64;

// Takes sums over a cluster. Every block has a buffer of numbers in its shared memory: warps post a number to all
// blocks' buffers, and each block adds up its own, once all numbers of a sum are there.
//
// A block has two buffers, taken in turn, so that no warp waits for readers: a warp that posts to a buffer again has
// passed the gate of the sum between. For that every warp that has numbers had posted one, after it had read the sum
// before and, if it is its block's first, had made its gate expect that sum. Warps without numbers neither wait nor
// read, and no warp posts to blocks without numbers: these may have ended. Others end after they passed their last
// gate, behind which nothing comes.
//
// `kSums`: sums that are taken together, at most.
template <uint32_t kSums = 1>
class ClusterReducer {
  public:
    // All threads, first of all.
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

    // All threads, once, before the first sum: every block of the cluster has started.
    __device__ __forceinline__ void open() const {
        if (blocks_ > 1) cluster_wait();
    }

    // N sums, each of `count` numbers, each the sum of the terms of one warp's lanes. A thread brings V terms of a sum:
    // the first for the number of its warp in the cluster, the others the cluster's warps on; those of numbers from
    // `count` on are left out. All threads call it, with the same `count` every time, and those whose warp has a number
    // get the sums.
    //
    // Which terms make a number, and in which order numbers are added, follows from the numbers alone: the bits are the
    // same over however many blocks, warps and terms a thread they are spread, and whatever is summed beside them.
    template <int N, int V>
    __device__ __forceinline__ void sum(const float (&terms)[N][V], float (&totals)[N], uint32_t count) {
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
            for (int j = 0; j < V; ++j) sums[n][j] = warp_sum(terms[n][j]);
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
            // A lane a block, of those that have numbers.
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
        for (int n = 0; n < N; ++n) totals[n] = total(buffer + n * kMaxReducerNumbers, count);
    }

  private:
    static __device__ __forceinline__ float total(const float* buffer, uint32_t count) {
        float sums[4] = {};
        // In batches, so that their loads go out together.
        for (uint32_t place = 0; place < count; place += 16) {
            float4 batch[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) batch[k] = *reinterpret_cast<const float4*>(buffer + place + 4 * k);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float numbers[4] = {batch[k].x, batch[k].y, batch[k].z, batch[k].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[i] += place + 4 * k + i < count ? numbers[i] : 0.0f;
            }
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    float* buffers_;
    Gate* gates_;
    uint32_t blocks_;
    uint32_t turns_ = 0;
};

}  // namespace comm_core
