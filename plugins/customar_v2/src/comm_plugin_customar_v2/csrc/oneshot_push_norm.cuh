// One-shot push with the norm: every rank stores its rows into a slot at every peer. Each row's cluster sums the rows
// that arrive, adds the residual and normalises, before it takes its next row.
//
// It is for few tokens, for which a call is one trip over the links. The residual and the weight are read during that
// trip, so the norm adds only a sum over the row's threads, for which they meet once. A row may be spread over a
// cluster of blocks, so that several multiprocessors send and sum it. norm.cuh has the lineage.
#pragma once

#include "norm.cuh"

namespace comm_customar_v2 {

// Takes the first `num_rows` rows, every `rows`-th by this cluster, whose first row `early` has if `is_early`.
template <typename T, int W, int V, bool kQuantizes, uint32_t kSums>
__device__ __forceinline__ void push_and_norm(const NormParams& params,
                                              const char* input,
                                              const Place<V>& place,
                                              const Cells<W>& cells,
                                              uint32_t first_row,
                                              uint32_t num_rows,
                                              uint32_t rows,
                                              float factor,
                                              ClusterReducer<kSums>& reducer,
                                              comm_core::SpinGuard& guard,
                                              bool is_early,
                                              const Vec (&early)[V]) {
    Vec weight[V];
    for (uint32_t row = first_row; row < num_rows; row += rows) {
        const uint32_t at = row * place.row_vecs * 16;
        Vec own[V], residual[V];
        if (is_early && row == first_row) {
#pragma unroll
            for (int j = 0; j < V; ++j) own[j] = early[j];
        } else {
            load_row(own, input + at, place);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (place.has(j)) cells.fill_theirs(at + place.offset(j), escape_sentinel(own[j]));
        }
        reconverge();
        // Load these while the vectors travel.
        load_row(residual, params.residual + at, place);
        if (row == first_row) load_row(weight, params.weight, place);
        constexpr int kAhead = looks_ahead(W, V, kQuantizes && W == 2 ? 2 : 8);
        Arrivals<W> arrivals[kAhead];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j % kAhead == 0) {
                // Issue all first loads before waiting for the first cell.
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    if (place.has(j + ahead)) arrivals[ahead].look(cells, at + place.offset(j + ahead));
                }
                reconverge();
            }
            if (place.has(j)) {
                Arrivals<W>& arrival = arrivals[j % kAhead];
                arrival.poll_until_full(cells, at + place.offset(j), params.plain, guard);
                comm_core::Sum<T> sum = sum_of_ranks<T, W>(own[j], arrival.vecs, params.plain.rank);
                sum.add(residual[j]);
                own[j] = sum.rounded();
                comm_core::store(params.sum + at + place.offset(j), own[j]);
            }
            reconverge();
        }
        norm_row<T, kQuantizes>(params, factor, reducer, place, own, weight, row);
        // Late, since the next launch needs the results, while the cells must be empty only for the launch after it.
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (place.has(j)) cells.empty_mine(at + place.offset(j));
        }
    }
}

template <typename T, int W, int V, bool kQuantizes = false>
__global__ void __launch_bounds__(max_norm_threads(W, NormAlgorithm::kOneShotPush, V, kQuantizes), 1)
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
    // Only from here on may it access data that kernels before it read and write.
    comm_core::wait_for_predecessors();
    const float factor = factor_of<kQuantizes>(params);
    push_and_norm<T, W, V, kQuantizes>(
        params, input, place, cells, first_row, num_rows, rows, factor, reducer, guard, false, {});
}

}  // namespace comm_customar_v2
