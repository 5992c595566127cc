// One-shot push: every rank stores its message into a slot at every peer, and sums the messages that arrive.
//
// It needs neither barrier nor fence, because a cell is its own flag; cells.cuh has the lineage. A thread has V vectors
// in flight: it loads them all, sends them all, then receives the peers' vectors and writes the sums. Its own vectors
// stay in registers. It is for messages that the grid takes in one or two rounds; oneshot_stream.cuh is for more.
#pragma once

#include "cells.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

// Pushes and sums a message of `num_vecs` vectors. `input`, `output` and `cells` begin at this thread's first vector,
// which `early` has if `is_early`.
template <typename T, int W, int V>
__device__ __forceinline__ void push_and_sum(const Params& params,
                                             const char* input,
                                             char* output,
                                             Cells<W>& cells,
                                             uint32_t num_vecs,
                                             uint32_t thread,
                                             uint32_t stride,
                                             comm_core::SpinGuard& guard,
                                             bool is_early = false,
                                             const Vec& early = Vec{}) {
    for (uint32_t first = thread; first < num_vecs; first += V * stride) {
        Vec own[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (first + j * stride >= num_vecs) continue;
            own[j] = j == 0 && is_early && first == thread ? early : comm_core::load(input + j * stride * 16);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (first + j * stride < num_vecs) cells.fill_theirs(j * stride * 16, escape_sentinel(own[j]));
        }
        constexpr int kAhead = looks_ahead(W, V, 8);
        Arrivals<W> arrivals[kAhead];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const uint32_t offset = j * stride * 16;
            Arrivals<W>& arrival = arrivals[j % kAhead];
            if (j % kAhead == 0) {
                // Issue all first loads before waiting for the first cell.
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    if (first + (j + ahead) * stride < num_vecs)
                        arrivals[ahead].look(cells, offset + ahead * stride * 16);
                }
            }
            if (first + j * stride >= num_vecs) continue;
            arrival.poll_until_full(cells, offset, params, guard);
            comm_core::store(output + offset, sum_in_rank_order<T, W>(own[j], arrival.vecs, params.rank));
        }
        // Late, since the next launch needs the sums, while the cells must be empty only for the launch after it.
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (first + j * stride < num_vecs) cells.empty_mine(j * stride * 16);
        }
        input += V * stride * 16;
        output += V * stride * 16;
        cells.advance(V * stride * 16);
    }
}

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, V), 1) oneshot_push(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    comm_core::SpinGuard guard;
    // All addresses are computed before the wait, so that the input's load comes right after it.
    const uint32_t num_vecs = comm_core::ready(params.num_vecs), stride = comm_core::ready(threads_in_grid());
    const uint32_t thread = comm_core::ready(thread_in_grid());
    const char* input = comm_core::ready(params.input + thread * 16);
    char* output = comm_core::ready(params.output + thread * 16);
    Cells<W> cells(slots, thread * 16);
    // Only from here on may it access the input, the cells and the output: kernels before it read and write them.
    comm_core::wait_for_predecessors();

    push_and_sum<T, W, V>(params, input, output, cells, num_vecs, thread, stride, guard);
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
