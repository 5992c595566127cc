// Two-stage: each rank owns a part of the message, sums it, and stages the sum, which all gather.
//
// 2 (W - 1) W-ths of the message come over the links, instead of W - 1 whole ones. A thread works on the same places of
// every part, on every rank: so its block depends on the blocks of its own number alone, and `output` may be `input`,
// whose other parts a thread has copied before its block meets its peers.
#pragma once

#include "params.cuh"

namespace comm_customar_v1 {

// The d-th rank after this one, from 0. Ranks begin with different peers, so that not all read from one at first.
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
    // From here on on what others wrote and read: the input, the staging, the output.
    comm_core::wait_for_predecessors();

    // The parts that peers sum.
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
                // Where nobody staged or reads anything before the second barrier.
                comm_core::store(copy + (begin + place) * 16, sum);
                comm_core::store(params.output + (begin + place) * 16, sum);
            }
        }
    }
    meet<W>(params, 1, epoch, guard);

    // From all peers at once: what comes from one after the other takes as many trips over the links.
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
