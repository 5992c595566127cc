// Two-shot push with the norm: each rank owns every W-th row. A row's shares are sent to its owner, who sums them, adds
// the residual and sends the sum to all. Every rank normalises every row.
//
// A rank sends 2 (W - 1) / W of the message, the owners' sums included. If only a row's owner normalised it, and sent
// both results, it would be 3 (W - 1) / W. Instead, the norm costs each rank only arithmetic on sums that it holds in
// registers anyway. Only the owner reads the residual.
//
// Cells are used as in twoshot_push.cuh: the lower half of a slot holds a peer's shares of this rank's rows, the upper
// half the sums of the peer's rows. A cluster takes groups of W consecutive rows, one of each owner, in rounds: shares
// are sent `pipeline_depth` rounds before they are summed, and sums as many rounds before they are gathered. For any
// grids and depth there is no deadlock: a group's sums wait only for its shares, its gathering only for its sums, and a
// cluster that waits for a group has finished its part of the earlier ones.
#pragma once

#include "norm.cuh"

namespace comm_customar_v2 {

// The number of peers with rows in flight at once, to them and from them: the limit comes from registers.
__host__ __device__ constexpr int norm_sends(int world_size, bool quantizes) {
    return quantizes && world_size > 4 ? 1 : world_size <= 3 ? world_size - 1 : 2;
}
__host__ __device__ constexpr int norm_gathers(int world_size, bool quantizes) {
    return quantizes || world_size > 4 ? 1 : world_size - 1;
}

// How the first `num_rows` rows, at least one for each rank, are divided among clusters and into rounds.
template <int W>
struct Groups {
    uint32_t num_rows, rank, row_nbytes, cluster, clusters, pipeline_depth, rounds, upper;

    __device__ __forceinline__ Groups(const NormParams& params, uint32_t row_vecs, uint32_t num_rows)
        : num_rows(num_rows),
          rank(params.plain.rank),
          row_nbytes(row_vecs * 16),
          cluster(comm_core::cluster_in_grid()),
          clusters(comm_core::clusters_in_grid()),
          pipeline_depth(params.plain.pipeline_depth),
          rounds(((num_rows + W - 1) / W + clusters - 1) / clusters),
          upper(static_cast<uint32_t>(params.plain.cells_nbytes / 2)) {}
};

// Takes rows. `cells` begin at the slots.
template <typename T, int W, int V, bool kQuantizes>
__device__ __forceinline__ void norm_parts(const NormParams& params,
                                           const Slots<W>& slots,
                                           const Place<V>& place,
                                           const Cells<W>& cells,
                                           const Groups<W>& all,
                                           float factor,
                                           ClusterReducer<norm_gathers(W, kQuantizes)>& reducer,
                                           comm_core::SpinGuard& guard) {
    constexpr int kSends = norm_sends(W, kQuantizes), kGathers = norm_gathers(W, kQuantizes);
    const uint32_t num_rows = all.num_rows, rank = all.rank, row_nbytes = all.row_nbytes, cluster = all.cluster;
    const uint32_t clusters = all.clusters, pipeline_depth = all.pipeline_depth, rounds = all.rounds;
    const uint32_t upper = all.upper;

    Vec weight[V];
    for (uint32_t step = 0; step < rounds + 2 * pipeline_depth; ++step) {
        if (step < rounds) {
            const uint32_t group = cluster + step * clusters;
            // Issue several peers' loads before the first store, which waits for its load.
#pragma unroll 1
            for (int from = 0; from < W - 1; from += kSends) {
                Vec shares[kSends][V];
                const auto row_of = [&](int d) { return group * W + Slots<W>::after(rank, d); };
#pragma unroll
                for (int i = 0; i < kSends; ++i) {
                    const int d = from + i;
                    if (d < W - 1 && row_of(d) < num_rows)
                        load_row(shares[i], params.plain.input + row_of(d) * row_nbytes, place);
                }
#pragma unroll
                for (int i = 0; i < kSends; ++i) {
                    const int d = from + i;
                    if (d >= W - 1 || row_of(d) >= num_rows) continue;
                    char* const theirs = slots.theirs(d) + group * row_nbytes;
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        if (place.has(j)) fill(theirs + place.offset(j), escape_sentinel(shares[i][j]));
                    }
                }
            }
            reconverge();
        }
        if (step == 0) load_row(weight, params.weight, place);
        if (step >= pipeline_depth && step - pipeline_depth < rounds) {
            const uint32_t group = cluster + (step - pipeline_depth) * clusters, row = group * W + rank;
            if (row < num_rows) {
                const uint32_t at = row * row_nbytes, cell = group * row_nbytes;
                Vec sums[V];
                constexpr int kAhead = looks_ahead(W, V, 4);
                Vec own[kAhead], residual[kAhead];
                Arrivals<W> arrivals[kAhead];
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    if (j % kAhead == 0) {
#pragma unroll
                        for (int ahead = 0; ahead < kAhead; ++ahead) {
                            if (!place.has(j + ahead)) continue;
                            const uint32_t offset = place.offset(j + ahead);
                            own[ahead] = comm_core::load(params.plain.input + at + offset);
                            residual[ahead] = comm_core::load(params.residual + at + offset);
                            arrivals[ahead].look(cells, cell + offset);
                        }
                        reconverge();
                    }
                    if (place.has(j)) {
                        Arrivals<W>& arrival = arrivals[j % kAhead];
                        arrival.poll_until_full(cells, cell + place.offset(j), params.plain, guard);
                        comm_core::Sum<T> sum = sum_of_ranks<T, W>(own[j % kAhead], arrival.vecs, rank);
                        sum.add(residual[j % kAhead]);
                        // Peers and this rank get the same bits.
                        sums[j] = escape_sentinel(sum.rounded());
                        cells.fill_theirs(upper + cell + place.offset(j), sums[j]);
                        comm_core::store(params.sum + at + place.offset(j), sums[j]);
                        cells.empty_mine(cell + place.offset(j));
                    }
                    reconverge();
                }
                norm_row<T, kQuantizes>(params, factor, reducer, place, sums, weight, row);
            }
        }
        if (step < 2 * pipeline_depth) continue;
        const uint32_t group = cluster + (step - 2 * pipeline_depth) * clusters;
#pragma unroll 1
        for (int from = 0; from < W - 1; from += kGathers) {
            // Gather several owners' sums together. A row that doesn't exist has no sum to wait for.
            Vec sums[V][kGathers];
            const auto owner_of = [&](int i) { return Slots<W>::source(rank, from + i); };
            const auto has_row = [&](int i) { return from + i < W - 1 && group * W + owner_of(i) < num_rows; };
            const auto cell_of = [&](int i, int j) {
                return slots.mine(from + i) + upper + group * row_nbytes + place.offset(j);
            };
#pragma unroll
            for (int j = 0; j < V; ++j) {
#pragma unroll
                for (int i = 0; i < kGathers; ++i) {
                    sums[j][i] = Vec{};
                    if (place.has(j) && has_row(i)) sums[j][i] = comm_core::load_relaxed_sys(cell_of(i, j));
                }
            }
            reconverge();
#pragma unroll
            for (int j = 0; j < V; ++j) {
                poll_until_full(sums[j], [&](int i) { return cell_of(i, j); }, owner_of, params.plain, guard);
                reconverge();
            }
            // Owners ascend: if the first row doesn't exist, none does.
            if (!has_row(0)) continue;
            uint32_t rows[kGathers];
            bool present[kGathers];
#pragma unroll
            for (int i = 0; i < kGathers; ++i) {
                rows[i] = group * W + owner_of(i);
                present[i] = has_row(i);
                if (!present[i]) continue;
                const uint32_t at = rows[i] * row_nbytes;
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    if (!place.has(j)) continue;
                    comm_core::store(params.sum + at + place.offset(j), sums[j][i]);
                    empty(cell_of(i, j));
                }
            }
            // Normalise them together, so that the cluster meets once.
            norm_rows<T, kQuantizes>(params, factor, reducer, place, sums, weight, rows, present);
        }
    }
}

template <typename T, int W, int V, bool kQuantizes = false>
__global__ void __launch_bounds__(max_norm_threads(W, NormAlgorithm::kTwoShotPush, V, kQuantizes), 1)
    twoshot_push_norm(const __grid_constant__ NormParams params) {
    ClusterReducer<norm_gathers(W, kQuantizes)> reducer;
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params.plain));
    const Slots<W> slots(params.plain, params.plain.cells_at, params.plain.cells_nbytes, epoch);
    const Place<V> place(params);
    const Groups<W> groups(params, place.row_vecs, params.num_rows);
    const Cells<W> cells(slots, 0);
    comm_core::SpinGuard guard;
    prefetch(params, place, groups.cluster * W + params.plain.rank);
    reducer.open();
    comm_core::wait_for_predecessors();
    const float factor = factor_of<kQuantizes>(params);
    norm_parts<T, W, V, kQuantizes>(params, slots, place, cells, groups, factor, reducer, guard);
}

}  // namespace comm_customar_v2
