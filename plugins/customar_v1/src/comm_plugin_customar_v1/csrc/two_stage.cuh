// Two-stage: each rank owns a part of the message, sums it, and stages the sum; then every rank gathers all sums.
//
// A rank reads 2 (W - 1) / W messages from its peers, instead of W - 1. A thread works on the same vectors of every
// part on every rank. Its block therefore depends only on the block of the same index of each peer; and `output` may be
// `input`, since a thread has staged its vectors of the other parts before its block passes the first barrier.
#pragma once

#include "params.cuh"

namespace comm_customar_v1 {

// The d-th rank after this one, counted from 0. Ranks begin with different peers, so that not all of them read from one
// rank at once.
template <int W>
__device__ __forceinline__ uint32_t rank_after(uint32_t rank, int d) {
    const uint32_t peer = rank + 1 + d;
    return peer < W ? peer : peer - W;
}

template <typename T, int W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) two_stage(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const uint32_t num_vecs = params.num_vecs, rank = params.rank, stride = threads_in_grid();
    const uint32_t thread = thread_in_grid(), part = (num_vecs + W - 1) / W;
    const Staged staged(params, epoch);
    char* const copy = staged.mine();
    comm_core::SpinGuard guard;
    // Only from here on it accesses memory that earlier kernels use: the input, the staging, the output.
    comm_core::wait_for_predecessors();

    // Stage the parts that the peers sum.
    for (uint32_t place = thread; place < part; place += stride) {
        Vec own[W - 1];
#pragma unroll
        for (int d = 0; d < W - 1; ++d) {
            const uint32_t vec = rank_after<W>(rank, d) * part + place;
            if (vec < num_vecs) own[d] = comm_core::load(params.input + vec * 16);
        }
#pragma unroll
        for (int d = 0; d < W - 1; ++d) {
            const uint32_t vec = rank_after<W>(rank, d) * part + place;
            if (vec < num_vecs) comm_core::store(copy + vec * 16, own[d]);
        }
    }
    stage_tail(params, staged);
    meet<W>(params, 0, epoch, guard);

    {
        const uint32_t begin = rank * part, end = min(part, num_vecs - min(num_vecs, begin));
        const char* terms[W];
#pragma unroll
        for (int q = 0; q < W; ++q) terms[q] = staged.terms_of(q) + begin * 16;
        for (uint32_t first = thread; first < end; first += V * stride) {
            Vec vecs[V][W];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t place = first + j * stride;
                if (place >= end) continue;
#pragma unroll
                for (int q = 0; q < W; ++q) vecs[j][q] = pull(terms[q] + place * 16);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t place = first + j * stride;
                if (place >= end) continue;
                const Vec sum = sum_of<T, W>(vecs[j]);
                // This rank's own part of the staging: no rank reads it before the second barrier.
                comm_core::store(copy + (begin + place) * 16, sum);
                comm_core::store(params.output + (begin + place) * 16, sum);
            }
        }
    }
    meet<W>(params, 1, epoch, guard);

    // Read from all peers at once: one peer after another would take W - 1 round trips over the links.
    for (uint32_t first = thread; first < part; first += V * stride) {
        Vec vecs[V][W - 1];
#pragma unroll
        for (int j = 0; j < V; ++j) {
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                const uint32_t owner = rank_after<W>(rank, d), place = first + j * stride, vec = owner * part + place;
                if (place < part && vec < num_vecs)
                    vecs[j][d] = pull(staged.copy_of(static_cast<int>(owner)) + vec * 16);
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                const uint32_t place = first + j * stride, vec = rank_after<W>(rank, d) * part + place;
                if (place < part && vec < num_vecs) comm_core::store(params.output + vec * 16, vecs[j][d]);
            }
        }
    }
    sum_tail<T, W>(params, staged);
}

}  // namespace comm_customar_v1
