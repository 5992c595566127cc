// One-shot or two-shot push with the norm of a padded batch, by its number of real rows; padded.cuh describes both.
#pragma once

#include "oneshot_push_norm.cuh"
#include "padded.cuh"
#include "twoshot_push_norm.cuh"

namespace comm_customar_v2 {

struct PaddedNormParams {
    NormParams norm;
    Padding padding;
};

__host__ __device__ constexpr int max_padded_norm_threads(int world_size) {
    return world_size <= 4 ? 512 : 256;
}

// The vectors of a row that a thread holds: the fewest, since a small message should be spread thinly.
__host__ __device__ constexpr int padded_norm_vecs(int world_size) {
    return min_norm_vecs(world_size);
}

// The blocks that share a row, at least: two ranks have larger blocks instead.
__host__ __device__ constexpr uint32_t padded_cluster(int world_size) {
    return world_size == 2 ? 2 : 4;
}

// The first clusters load their rows beside the number of real ones, since most replays have few.
constexpr uint32_t kEarlyRows = 64;

template <typename T, int W, bool kQuantizes>
__global__ void __launch_bounds__(max_padded_norm_threads(W), W == 2 && !kQuantizes ? 2 : 1)
    padded_push_norm(const __grid_constant__ PaddedNormParams padded) {
    constexpr int V = padded_norm_vecs(W);
    const NormParams& params = padded.norm;
    ClusterReducer<norm_gathers(W, kQuantizes)> reducer;
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params.plain));
    const Slots<W> slots(params.plain, params.plain.cells_at, params.plain.cells_nbytes, epoch);
    const Place<V> place(params);
    const uint32_t cluster = comm_core::ready(comm_core::cluster_in_grid());
    const uint32_t clusters = comm_core::ready(comm_core::clusters_in_grid());
    const Cells<W> cells(slots, 0);
    comm_core::SpinGuard guard;
    prefetch(params, place, cluster);
    reducer.open();
    comm_core::wait_for_predecessors();

    const bool is_early = cluster < kEarlyRows;  // a grid has no more clusters than there are rows
    Vec early[V];
    if (is_early) load_row(early, params.plain.input + cluster * place.row_vecs * 16, place);
    const uint32_t num_rows = real_size<1>(padded.padding, params.num_rows);
    const float factor = factor_of<kQuantizes>(params);
    if (num_rows <= padded.padding.one_shot) {
        push_and_norm<T, W, V, kQuantizes>(params,
                                           params.plain.input,
                                           place,
                                           cells,
                                           cluster,
                                           num_rows,
                                           clusters,
                                           factor,
                                           reducer,
                                           guard,
                                           is_early,
                                           early);
    } else {
        norm_parts<T, W, V, kQuantizes>(
            params, slots, place, cells, Groups<W>(params, place.row_vecs, num_rows), factor, reducer, guard);
    }
}

}  // namespace comm_customar_v2
