// Sums over all threads of a cluster (cluster.cuh), often a single block, whose bits don't depend on its shape.
#pragma once

#include "cluster.cuh"

namespace comm_core {

// Numbers, of which every block of the cluster has a copy: warps post to all copies, and each block reads its own, once
// all numbers of a sum are there.
//
// There are two boards, taken in turn, so that nobody waits for readers: who posts to a board again has passed the gate
// of the sum between. For that every warp that has numbers had posted one, after it had read the sum before and, where
// it is its block's first, had told its gate to expect that sum. Warps without numbers neither wait nor read, and
// nobody posts to blocks without: these may have ended. Others end after they passed their last gate, behind which
// nothing comes.
class Board {
  public:
    // Numbers of a sum, at most.
    static constexpr uint32_t kSize = 64;

    // All threads, first of all.
    __device__ __forceinline__ Board()
        : boards_(shared_numbers<2 * kSize>()), gates_(shared_gates<2>()), blocks_(blocks_in_cluster()) {
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

    // The sum of `count` numbers, each the sum of the terms of one warp's lanes. A thread brings V terms: the first for
    // the number of its warp in the cluster, the others the cluster's warps on; those of numbers from `count` on are
    // left out. All threads call it, with the same `count` every time, and those whose warp has a number get the sum.
    //
    // Which terms make a number, and in which order numbers are added, follows from the numbers alone: the bits are the
    // same over however many blocks, warps and terms a thread they are spread.
    template <int V>
    __device__ __forceinline__ float sum(const float (&terms)[V], uint32_t count) {
        const uint32_t turn = sums_ % 2, parity = sums_ / 2 % 2;
        ++sums_;
        float* const board = boards_ + turn * kSize;
        const uint32_t warps = blockDim.x / 32, lane = threadIdx.x % 32;
        const uint32_t first = block_in_cluster() * warps + threadIdx.x / 32;
        float sums[V];
#pragma unroll
        for (int j = 0; j < V; ++j) sums[j] = warp_sum(terms[j]);
        if (blocks_ == 1) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (lane == 0 && first + j * warps < count) board[first + j * warps] = sums[j];
            }
            __syncthreads();
        } else {
            if (first >= count) return 0.0f;
            Gate* const gate = gates_ + turn;
            if (threadIdx.x == 0) expect(gate, count * sizeof(float));
            // A lane a block, of those that have numbers.
            const bool posts = lane < blocks_ && lane * warps < count;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t number = first + j * blocks_ * warps;
                if (posts && number < count) post(board + number, gate, lane, sums[j]);
            }
            pass(gate, parity);
        }
        return total(board, count);
    }

  private:
    static __device__ __forceinline__ float total(const float* board, uint32_t count) {
        float sums[4] = {};
        // In batches, so that their loads go out together.
        for (uint32_t place = 0; place < count; place += 16) {
            float4 batch[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) batch[k] = *reinterpret_cast<const float4*>(board + place + 4 * k);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float numbers[4] = {batch[k].x, batch[k].y, batch[k].z, batch[k].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[i] += place + 4 * k + i < count ? numbers[i] : 0.0f;
            }
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    float* boards_;
    Gate* gates_;
    uint32_t blocks_;
    uint32_t sums_ = 0;
};

}  // namespace comm_core
