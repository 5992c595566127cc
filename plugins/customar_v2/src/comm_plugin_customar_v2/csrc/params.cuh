// What every kernel is launched with, and how a rank's buffer is laid out.
//
// A rank's buffer, the same on all ranks, begins with the launch counter; then come
//
//   tails    2 phases of a slot a peer, each one cell: what of a message is less than a vector (tail.cuh)
//   cells    2 phases of a slot a peer, all empty between launches (cells.cuh)
//
// A rank has no slot for itself: its own part comes from its input.
//
// Why two phases, taken in turn by launches, are enough, whatever algorithms, grids and sizes the launches have, and
// although a launch's blocks may be there before the launch before has ended (comm_core/pdl.cuh): they touch no slot
// before `wait_for_predecessors`, so that for slots launches come one after the other. I write the
// phase of launch k again in launch k + 2. My launch k + 1 has ended by then, and it didn't without hearing from every
// peer's launch k + 1; a peer says nothing in launch k + 1 before its launch k has ended. So every peer has read (and
// emptied) what launch k brought. Every algorithm hears from every peer in each launch; the two-shot push only where
// every rank owns a part, which two_shot_vecs() sees to; a message of less than a vector by its tail.
//
// "Hears" is a relaxed load, which carries no order of its own. None is needed: what the peer did in launch k was
// performed in its memory when that launch ended, before it could say anything in launch k + 1. The end of a launch is
// the one fence that this rests on, and wait_for_predecessors() returns after it.
#pragma once

#include <comm_core/epoch.cuh>
#include <comm_core/grid.cuh>
#include <comm_core/memory.cuh>
#include <comm_core/pdl.cuh>
#include <comm_core/vec.cuh>
#include <comm_core/wait.cuh>

#include <cstddef>
#include <cstdint>

namespace comm_customar_v2 {

using comm_core::thread_in_grid;
using comm_core::threads_in_grid;
using comm_core::Vec;

constexpr int kMaxRanks = 8;

// The two-shot push takes messages of at least this many vectors: then no rank's part is empty.
constexpr uint32_t two_shot_vecs(int world_size) {
    return world_size * world_size;
}

enum class Algorithm : int32_t {
    kOneShotPush = 0,    // oneshot_push.cuh
    kOneShotStream = 1,  // oneshot_stream.cuh
    kTwoShotPush = 2,    // twoshot_push.cuh
    kCount = 3,
};

struct Params {
    const char* input;
    char* output;
    char* buffers[kMaxRanks];  // by rank, as this device sees them
    comm_core::Bound bound;
    uint64_t tails_at;
    uint64_t cells_at, cells_nbytes;  // of a slot
    uint32_t num_vecs;                // whole ones
    uint32_t tail_nbytes;             // what follows them, 0 to 14
    uint32_t rank;
    uint32_t pipeline_depth;  // of the kernels that work in rounds: how many their pushes are ahead of their sums
};

__device__ __forceinline__ unsigned long long* counter_of(const Params& params) {
    return reinterpret_cast<unsigned long long*>(params.buffers[params.rank]);
}

// The slots of a launch's phase in a region of the buffers.
template <int W>
class Slots {
  public:
    __device__ __forceinline__ Slots(const Params& params, uint64_t at, uint64_t slot_nbytes, unsigned long long epoch)
        : buffers_(params.buffers),
          first_(at + (epoch & 1) * (W - 1) * slot_nbytes),
          nbytes_(slot_nbytes),
          rank_(params.rank) {
        mine_ = buffers_[rank_] + first_;
        if constexpr (W == 2) theirs_ = buffers_[1 - rank_] + first_;
    }

    // Of the d-th rank after this one, from 0, the slot that this rank fills. Ranks begin with different peers, so that
    // not all push to one at first.
    __device__ __forceinline__ char* theirs(int d) const {
        if constexpr (W == 2) {
            return theirs_;
        } else {
            const uint32_t peer = after(rank_, d);
            // Among the slots of `peer` this rank's is number `rank`, or one less where `peer` itself comes before.
            return buffers_[peer] + first_ + (rank_ - (rank_ > peer)) * nbytes_;
        }
    }

    // Of this rank's slots, in the order of the ranks that fill them, number `slot`.
    __device__ __forceinline__ char* mine(int slot) const { return mine_ + slot * nbytes_; }

    __device__ __forceinline__ uint64_t nbytes() const { return nbytes_; }

    static __device__ __forceinline__ uint32_t after(uint32_t rank, int d) {
        const uint32_t peer = rank + 1 + d;
        return peer < W ? peer : peer - W;
    }

    // The rank that fills the slot number `slot` here.
    static __device__ __forceinline__ uint32_t source(uint32_t rank, int slot) {
        return slot + (slot >= static_cast<int>(rank));
    }

  private:
    char* const* buffers_;
    uint64_t first_, nbytes_;
    uint32_t rank_;
    char* mine_;
    char* theirs_;
};

// By value: a choice between two vectors' places would put them into memory.
__device__ __forceinline__ Vec either(bool first, const Vec& one, const Vec& other) {
    return {first ? one.x : other.x, first ? one.y : other.y, first ? one.z : other.z, first ? one.w : other.w};
}

// The sum in rank order of this rank's vector and its peers', which come in rank order.
template <typename T, int W>
__device__ __forceinline__ comm_core::Sum<T> sum_of_ranks(const Vec& own, const Vec (&theirs)[W - 1], uint32_t rank_) {
    const int rank = static_cast<int>(rank_);
    if constexpr (W == 2) {
        // Two terms give the same bits in either order.
        comm_core::Sum<T> sum(own);
        sum.add(theirs[0]);
        return sum;
    } else {
        comm_core::Sum<T> sum(either(rank == 0, own, theirs[0]));
#pragma unroll
        for (int q = 1; q < W; ++q) {
            const Vec other = q < W - 1 ? either(q < rank, theirs[q < W - 1 ? q : 0], theirs[q - 1]) : theirs[q - 1];
            sum.add(either(q == rank, own, other));
        }
        return sum;
    }
}

template <typename T, int W>
__device__ __forceinline__ Vec sum_in_rank_order(const Vec& own, const Vec (&theirs)[W - 1], uint32_t rank) {
    return sum_of_ranks<T, W>(own, theirs, rank).rounded();
}

// The most threads of a block, by what each has in flight: what their registers allow.
__host__ __device__ constexpr int max_threads(int world_size, int vecs) {
    if (world_size == 2) return vecs >= 4 ? 512 : 1024;
    return (world_size - 1) * vecs >= 5 ? 256 : 512;
}

}  // namespace comm_customar_v2
