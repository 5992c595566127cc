// Cells: vectors in a slot, each of which is its own flag.
//
// An empty cell has all bits set. A sender sends no 32-bit word with all bits set: such a word is one or two NaNs, and
// its lowest bit is cleared, which leaves them NaNs. So a cell is full once none of its words is empty. Each word is
// checked by itself, since only words are sure to arrive whole. A NaN's payload doesn't survive a sum anyway; every
// other value, -0.0 among them, arrives as it was sent.
//
// The reader of a cell empties it, with an ordinary store. The cell is filled again two launches later (params.cuh): by
// a peer that has heard from this rank in the launch between, and so after the launch that emptied it has ended.
//
// Lineage: NCCL's LL protocol (src/device/prims_ll.h) stores a flag beside each 32-bit word, in the same 16 bytes.
// Lamport-style kernels need no flag, since a value marks what is empty: -0.0 in TensorRT-LLM's
// allReduceFusionKernels.cu and FlashInfer's trtllm_allreduce_fusion.cuh, which send -0.0 as +0.0; +0.0 in SGLang's
// custom_all_reduce_push.cuh, which sends +0.0 as -0.0. A NaN as the mark keeps both zeros.
#pragma once

#include "params.cuh"

namespace comm_customar_v2 {

constexpr uint32_t kEmpty = 0xffffffffu;

// Returns the vector to send for `vec`: the same, except that no word is empty.
__device__ __forceinline__ Vec escape_sentinel(const Vec& vec) {
    return {min(vec.x, kEmpty - 1), min(vec.y, kEmpty - 1), min(vec.z, kEmpty - 1), min(vec.w, kEmpty - 1)};
}

__device__ __forceinline__ bool full(const Vec& vec) {
    return max(max(vec.x, vec.y), max(vec.z, vec.w)) != kEmpty;
}

// Relaxed: the cell is data and flag in one, so there are no other accesses to order.
__device__ __forceinline__ void fill(char* cell, const Vec& vec) {
    comm_core::store_relaxed_sys(cell, vec);
}

__device__ __forceinline__ void empty(char* cell) {
    comm_core::store(cell, Vec{kEmpty, kEmpty, kEmpty, kEmpty});
}

// Returns the first empty cell's index, or -1 if all are full.
template <int N>
__device__ __forceinline__ int missing_of(const Vec (&vecs)[N]) {
    int missing = -1;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
        if (!full(vecs[i])) missing = i;
    }
    return missing;
}

// Loads the cells that were empty again until all are full. `vecs` has the vectors of the last load. Each turn loads
// all cells that are still empty, since a load takes as long as a small message does over the links, and loads one
// after another would take a multiple of that. `cell_of(i)` is the address of cell i, `source_of(i)` the rank that
// fills it.
template <int N, typename CellOf, typename SourceOf>
__device__ __forceinline__ void poll_until_full(Vec (&vecs)[N],
                                                const CellOf& cell_of,
                                                const SourceOf& source_of,
                                                const Params& params,
                                                comm_core::SpinGuard& guard) {
    if (missing_of(vecs) < 0) return;
    guard.wait(params.bound, thread_in_grid() == 0, [&](uint32_t& rank) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            // A single cell is known to be empty.
            if (N == 1 || !full(vecs[i])) vecs[i] = comm_core::load_relaxed_sys(cell_of(i));
        }
        const int missing = missing_of(vecs);
        if (missing >= 0) rank = source_of(missing);
        return missing < 0;
    });
}

// A thread's addresses in the slots, computed before the wait for predecessors.
template <int W>
class Cells {
  public:
    __device__ __forceinline__ Cells(const Slots<W>& slots, uint64_t offset)
        : mine_(comm_core::ready(slots.mine(0) + offset)), nbytes_(slots.nbytes()) {
#pragma unroll
        for (int d = 0; d < W - 1; ++d) theirs_[d] = comm_core::ready(slots.theirs(d) + offset);
    }

    __device__ __forceinline__ char* mine(int slot, uint32_t offset) const { return mine_ + slot * nbytes_ + offset; }

    __device__ __forceinline__ void fill_theirs(uint32_t offset, const Vec& vec) const {
#pragma unroll
        for (int d = 0; d < W - 1; ++d) fill(theirs_[d] + offset, vec);
    }

    __device__ __forceinline__ void empty_mine(uint32_t offset) const {
#pragma unroll
        for (int s = 0; s < W - 1; ++s) empty(mine(s, offset));
    }

    __device__ __forceinline__ void advance(uint64_t nbytes) {
        mine_ += nbytes;
#pragma unroll
        for (int d = 0; d < W - 1; ++d) theirs_[d] += nbytes;
    }

  private:
    char* mine_;
    uint64_t nbytes_;
    char* theirs_[W - 1];
};

// One vector from every peer: from the cells `offset` bytes after the thread's address in each of this rank's slots.
template <int W>
struct Arrivals {
    Vec vecs[W - 1];

    // Loads all cells once, without waiting for them to be full.
    __device__ __forceinline__ void look(const Cells<W>& cells, uint32_t offset) {
#pragma unroll
        for (int s = 0; s < W - 1; ++s) vecs[s] = comm_core::load_relaxed_sys(cells.mine(s, offset));
    }

    // Loads the empty cells again until all are full.
    __device__ __forceinline__ void poll_until_full(const Cells<W>& cells,
                                                    uint32_t offset,
                                                    const Params& params,
                                                    comm_core::SpinGuard& guard) {
        comm_customar_v2::poll_until_full(
            vecs,
            [&](int s) { return cells.mine(s, offset); },
            [&](int s) { return Slots<W>::source(params.rank, s); },
            params,
            guard);
    }
};

// Returns for how many of a round's `vecs` vectors a thread issues the first loads before it waits for any of them; a
// divisor of `vecs`. `most` is the number of vectors, counted over all peers, that a thread's registers allow.
__host__ __device__ constexpr int looks_ahead(int world_size, int vecs, int most) {
    return (world_size - 1) * vecs <= most ? vecs : vecs > 1 ? looks_ahead(world_size, vecs / 2, most) : 1;
}

}  // namespace comm_customar_v2
