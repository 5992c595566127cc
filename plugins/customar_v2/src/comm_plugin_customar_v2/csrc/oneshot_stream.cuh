// One-shot push of messages that take the grid several rounds.
//
// As oneshot_push.cuh, but a thread's pushes run `pipeline_depth` rounds ahead of its sums. So the links are busy all
// the time, and most cells are full when the thread first loads them. The thread loads its own vectors again for the
// sum, from the second-level cache, which still has those of recent rounds.
#pragma once

#include "cells.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, V), 1) oneshot_stream(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    const uint32_t num_vecs = params.num_vecs, stride = threads_in_grid(), thread = thread_in_grid();
    const uint32_t rounds = (num_vecs + V * stride - 1) / (V * stride);
    const Cells<W> cells(slots, 0);
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();

    for (uint32_t step = 0; step < rounds + params.pipeline_depth; ++step) {
        if (step < rounds) {
            const uint32_t first = thread + step * V * stride;
            Vec own[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec < num_vecs) own[j] = comm_core::load(params.input + vec * 16);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec < num_vecs) cells.fill_theirs(vec * 16, escape_sentinel(own[j]));
            }
        }
        if (step < params.pipeline_depth) continue;
        const uint32_t first = thread + (step - params.pipeline_depth) * V * stride;
        // In place, the sums may overwrite the input: this thread alone reads these vectors, and it has pushed them.
        Vec own[V];
        constexpr int kAhead = looks_ahead(W, V, 4);
        Arrivals<W> arrivals[kAhead];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (vec < num_vecs) own[j] = comm_core::load(params.input + vec * 16);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t vec = first + j * stride;
            if (j % kAhead == 0) {
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    const uint32_t next = vec + ahead * stride;
                    if (next < num_vecs) arrivals[ahead].look(cells, next * 16);
                }
            }
            if (vec >= num_vecs) continue;
            Arrivals<W>& arrival = arrivals[j % kAhead];
            arrival.poll_until_full(cells, vec * 16, params, guard);
            comm_core::store(params.output + vec * 16, sum_in_rank_order<T, W>(own[j], arrival.vecs, params.rank));
            cells.empty_mine(vec * 16);
        }
    }
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
