// One-stage: every rank reads the whole message of every peer, and sums it.
//
// A thread copies and sums the same vectors on every rank. Its block therefore depends only on the block of the same
// index of each peer; and `output` may be `input`, since a thread reads each vector before it writes it.
#pragma once

#include "params.cuh"

namespace comm_customar_v1 {

template <typename T, int W, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) one_stage(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const uint32_t num_vecs = comm_core::ready(params.num_vecs), stride = comm_core::ready(threads_in_grid());
    const uint32_t thread = comm_core::ready(thread_in_grid());
    const Staged staged(params, epoch);
    char* const copy = comm_core::ready(staged.mine());
    comm_core::SpinGuard guard;
    // Only from here on it accesses memory that earlier kernels use: the input, the staging, the output.
    comm_core::wait_for_predecessors();

    for (uint32_t first = thread; first < num_vecs; first += V * stride) {
        Vec own[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec < num_vecs) own[j] = comm_core::load(params.input + vec * 16);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec < num_vecs) comm_core::store(copy + vec * 16, own[j]);
        }
    }
    stage_tail(params, staged);
    meet<W>(params, 0, epoch, guard);

    const char* terms[W];
#pragma unroll
    for (int q = 0; q < W; ++q) terms[q] = staged.terms_of(q);
    for (uint32_t first = thread; first < num_vecs; first += V * stride) {
        Vec vecs[V][W];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec >= num_vecs) continue;
#pragma unroll
            for (int q = 0; q < W; ++q) vecs[j][q] = pull(terms[q] + vec * 16);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec < num_vecs) comm_core::store(params.output + vec * 16, sum_of<T, W>(vecs[j]));
        }
    }
    sum_tail<T, W>(params, staged);
}

}  // namespace comm_customar_v1
