// Cells: vectors in a slot that are their own flags.
//
// An empty cell has all bits set. Who fills it sends no 32-bit word with all bits set: such a word is one or two NaNs,
// and loses its lowest bit, which leaves them NaNs. So a cell is full when none of its words is empty, each word judged
// for itself, since no more than a word is sure to arrive whole. NaN's payload doesn't survive a sum anyway; every
// other value, -0.0 among them, arrives as it was sent.
//
// Who reads a cell empties it, with an ordinary store: the next to fill it does so two launches later (params.cuh),
// after this launch has ended and its successor has told.
#pragma once

#include "params.cuh"

namespace comm_customar_v2 {

constexpr uint32_t kEmpty = 0xffffffffu;

// What is sent for a vector: no word of it is empty.
__device__ __forceinline__ Vec escape_sentinel(const Vec& vec) {
    return {min(vec.x, kEmpty - 1), min(vec.y, kEmpty - 1), min(vec.z, kEmpty - 1), min(vec.w, kEmpty - 1)};
}

__device__ __forceinline__ bool full(const Vec& vec) {
    return max(max(vec.x, vec.y), max(vec.z, vec.w)) != kEmpty;
}

// Relaxed: the cell is data and flag in one, so there is nothing to be ordered with it.
__device__ __forceinline__ void fill(char* cell, const Vec& vec) {
    comm_core::store_relaxed_sys(cell, vec);
}

__device__ __forceinline__ void empty(char* cell) {
    comm_core::store(cell, Vec{kEmpty, kEmpty, kEmpty, kEmpty});
}

// Looks again at the cells that were empty until all are full. `vecs`: what the last look saw. At all of them at once:
// a look takes as long as a small message is on its way, and one after the other would be that many times as long.
// `cell_of(i)`: its address; `source_of(i)`: the rank that fills it.
template <int N, typename CellOf, typename SourceOf>
__device__ __forceinline__ void poll_until_full(Vec (&vecs)[N],
                                                const CellOf& cell_of,
                                                const SourceOf& source_of,
                                                const Params& params,
                                                comm_core::SpinGuard& guard) {
    // The same loop for one cell, in fewer instructions.
    if constexpr (N == 1) {
        while (!full(vecs[0])) {
            if (guard.expired(params.bound, source_of(0))) break;
            vecs[0] = comm_core::load_relaxed_sys(cell_of(0));
        }
    } else {
        while (true) {
            int missing = -1;
#pragma unroll
            for (int i = N - 1; i >= 0; --i) {
                if (!full(vecs[i])) missing = i;
            }
            if (missing < 0 || guard.expired(params.bound, source_of(missing))) break;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (!full(vecs[i])) vecs[i] = comm_core::load_relaxed_sys(cell_of(i));
            }
        }
    }
}

// One thread's place in the slots, as addresses that are ready before the wait for predecessors.
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

// One vector of every peer, from the cells `offset` bytes on in each of this rank's slots.
template <int W>
struct Arrivals {
    Vec vecs[W - 1];

    // Looks once, without waiting for what it sees.
    __device__ __forceinline__ void look(const Cells<W>& cells, uint32_t offset) {
#pragma unroll
        for (int s = 0; s < W - 1; ++s) vecs[s] = comm_core::load_relaxed_sys(cells.mine(s, offset));
    }

    // Looks again until all are full.
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

// Of how many of a round's vectors the first looks go out before any is waited for: what a thread's registers allow, as
// vectors of any peer; it divides the round.
__host__ __device__ constexpr int looks_ahead(int world_size, int vecs, int most) {
    return (world_size - 1) * vecs <= most ? vecs : vecs > 1 ? looks_ahead(world_size, vecs / 2, most) : 1;
}

}  // namespace comm_customar_v2
