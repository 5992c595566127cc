// One-shot push with the norm: every rank puts its rows into a slot at every peer; each row's cluster sums what
// arrives, adds the residual and normalises, before it goes on to its next row.
//
// For few tokens, where a call is one trip over the links: the residual and the weight are read during that trip, and
// what the norm adds is a sum over the row's threads and one meeting. A row may be spread over a cluster of blocks, so
// that it is sent and summed by several multiprocessors.
#pragma once

#include "norm.cuh"

namespace comm_customar_v2 {

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_norm_threads(W, NormAlgorithm::kOneShotPush, V), 1)
    oneshot_push_norm(const __grid_constant__ NormParams params) {
    ClusterReducer<> reducer;
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params.plain));
    const Slots<W> slots(params.plain, params.plain.cells_at, params.plain.cells_nbytes, epoch);
    const Place<V> place(params);
    const uint32_t first_row = comm_core::ready(comm_core::cluster_in_grid()),
                   num_rows = comm_core::ready(params.num_rows);
    const uint32_t rows = comm_core::ready(comm_core::clusters_in_grid());
    const char* const input = comm_core::ready(params.plain.input);
    const Cells<W> cells(slots, 0);
    comm_core::SpinGuard guard;
    prefetch(params, place, first_row);
    reducer.open();
    // From here on on what others wrote and read.
    comm_core::wait_for_predecessors();

    Vec weight[V];
    for (uint32_t row = first_row; row < num_rows; row += rows) {
        const uint32_t at = row * place.row_vecs * 16;
        Vec own[V], residual[V];
        load_row(own, input + at, place);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (place.has(j)) cells.fill_theirs(at + place.offset(j), escape_sentinel(own[j]));
        }
        in_step();
        // While the vectors are on their way.
        load_row(residual, params.residual + at, place);
        if (row == first_row) load_row(weight, params.weight, place);
        constexpr int kAhead = looks_ahead(W, V, 8);
        Arrivals<W> arrivals[kAhead];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j % kAhead == 0) {
                // All the first looks go out before the first is waited for.
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    if (place.has(j + ahead)) arrivals[ahead].look(cells, at + place.offset(j + ahead));
                }
                in_step();
            }
            if (place.has(j)) {
                Arrivals<W>& arrival = arrivals[j % kAhead];
                arrival.poll_until_full(cells, at + place.offset(j), params.plain, guard);
                comm_core::Sum<T> sum = sum_of_ranks<T, W>(own[j], arrival.vecs, params.plain.rank);
                sum.add(residual[j]);
                own[j] = sum.rounded();
                comm_core::store(params.sum + at + place.offset(j), own[j]);
            }
            in_step();
        }
        norm_row<T>(params, reducer, place, own, weight, params.plain.output + at);
        // Late: the next launch waits for the results, and nobody for empty cells before the launch after it.
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (place.has(j)) cells.empty_mine(at + place.offset(j));
        }
    }
}

}  // namespace comm_customar_v2
