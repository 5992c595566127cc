// Two-shot push: each rank owns a part of the message. Every rank sends its shares of the other parts to their owners;
// an owner sums the shares of its part and sends the sum to all.
//
// A rank sends (W - 1) / W of the message twice, instead of the whole message to each of W - 1 peers. Cells are those
// of cells.cuh, with their lineage: the lower half of a slot holds a peer's share of this rank's part, the upper half
// the sum of the peer's part. A thread works at the same offsets of every part, so it depends only on the same-index
// thread of each peer, and a block only on the same-index blocks.
//
// It works in rounds: shares are sent `pipeline_depth` rounds before they are summed, and sums as many rounds before
// they are gathered.
#pragma once

#include "cells.cuh"
#include "tail.cuh"

namespace comm_customar_v2 {

// How a message of `num_vecs` vectors, at least `two_shot_vecs(W)`, is divided among the ranks and into rounds.
template <int W, int V>
struct Parts {
    uint32_t num_vecs, rank, stride, thread, part, rounds, pipeline_depth, upper;

    __device__ __forceinline__ Parts(const Params& params, uint32_t num_vecs)
        : num_vecs(num_vecs),
          rank(params.rank),
          stride(threads_in_grid()),
          thread(thread_in_grid()),
          part((num_vecs + W - 1) / W),
          rounds((part + V * stride - 1) / (V * stride)),
          pipeline_depth(params.pipeline_depth),
          upper(static_cast<uint32_t>(params.cells_nbytes / 2)) {}
};

// Sums a message. `cells` begin at the slots.
template <typename T, int W, int V>
__device__ __forceinline__ void sum_parts(const Params& params,
                                          const Slots<W>& slots,
                                          const Cells<W>& cells,
                                          const Parts<W, V>& parts,
                                          comm_core::SpinGuard& guard) {
    const uint32_t num_vecs = parts.num_vecs, rank = parts.rank, stride = parts.stride, thread = parts.thread;
    const uint32_t part = parts.part, rounds = parts.rounds, pipeline_depth = parts.pipeline_depth;
    const uint32_t upper = parts.upper;
    // Returns the length of a rank's part, in vectors: the last ones may be shorter.
    const auto end_of = [&](uint32_t owner) { return min(part, num_vecs - min(num_vecs, owner * part)); };

    for (uint32_t step = 0; step < rounds + 2 * pipeline_depth; ++step) {
        if (step < rounds) {
            const uint32_t first = thread + step * V * stride;
            // Issue all loads before the first store, which waits for its load.
            Vec shares[W - 1][V];
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                const uint32_t owner = Slots<W>::after(rank, d), begin = owner * part, end = end_of(owner);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const uint32_t vec = first + j * stride;
                    if (vec < end) shares[d][j] = comm_core::load(params.input + (begin + vec) * 16);
                }
            }
#pragma unroll
            for (int d = 0; d < W - 1; ++d) {
                const uint32_t end = end_of(Slots<W>::after(rank, d));
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const uint32_t vec = first + j * stride;
                    if (vec < end) fill(slots.theirs(d) + vec * 16, escape_sentinel(shares[d][j]));
                }
            }
        }
        if (step >= pipeline_depth && step - pipeline_depth < rounds) {
            const uint32_t first = thread + (step - pipeline_depth) * V * stride;
            const uint32_t begin = rank * part, end = end_of(rank);
            Vec own[V];
            constexpr int kAhead = looks_ahead(W, V, 4);
            Arrivals<W> arrivals[kAhead];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const uint32_t vec = first + j * stride;
                if (vec < end) own[j] = comm_core::load(params.input + (begin + vec) * 16);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (j % kAhead == 0) {
#pragma unroll
                    for (int ahead = 0; ahead < kAhead; ++ahead) {
                        const uint32_t vec = first + (j + ahead) * stride;
                        if (vec < end) arrivals[ahead].look(cells, vec * 16);
                    }
                }
                const uint32_t vec = first + j * stride;
                if (vec >= end) continue;
                Arrivals<W>& arrival = arrivals[j % kAhead];
                arrival.poll_until_full(cells, vec * 16, params, guard);
                // Peers and this rank get the same bits.
                const Vec sum = escape_sentinel(sum_in_rank_order<T, W>(own[j], arrival.vecs, rank));
                cells.fill_theirs(upper + vec * 16, sum);
                comm_core::store(params.output + (begin + vec) * 16, sum);
                cells.empty_mine(vec * 16);
            }
        }
        if (step < 2 * pipeline_depth) continue;
        const uint32_t first = thread + (step - 2 * pipeline_depth) * V * stride;
        // Gather all owners' sums of an offset together. If an owner's part ends before it, there is no sum to wait
        // for.
        Vec sums[V][W - 1];
        const auto owner_of = [&](int s) { return Slots<W>::source(rank, s); };
        const auto cell_of = [&](int s, int j) { return slots.mine(s) + upper + (first + j * stride) * 16; };
#pragma unroll
        for (int j = 0; j < V; ++j) {
#pragma unroll
            for (int s = 0; s < W - 1; ++s) {
                sums[j][s] = Vec{};
                if (first + j * stride < end_of(owner_of(s))) sums[j][s] = comm_core::load_relaxed_sys(cell_of(s, j));
            }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            poll_until_full(sums[j], [&](int s) { return cell_of(s, j); }, owner_of, params, guard);
#pragma unroll
            for (int s = 0; s < W - 1; ++s) {
                const uint32_t vec = first + j * stride;
                if (vec >= end_of(owner_of(s))) continue;
                comm_core::store(params.output + (owner_of(s) * part + vec) * 16, sums[j][s]);
                empty(cell_of(s, j));
            }
        }
    }
}

template <typename T, int W, int V>
__global__ void __launch_bounds__(max_threads(W, V), 1) twoshot_push(const __grid_constant__ Params params) {
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    const Parts<W, V> parts(params, params.num_vecs);
    const Cells<W> cells(slots, 0);
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();
    sum_parts<T>(params, slots, cells, parts, guard);
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
