// The parameters of every kernel, the layout of a rank's buffer, and why two phases are enough.
//
// A rank's buffer has the same layout on all ranks. It begins with the launch counter; then come
//
//   tails    for each dtype and length of a tail 2 phases, each with a slot of one cell for each peer: what follows a
//            message's last vector (tail.cuh)
//   cells    2 phases, each with a slot for each peer; all cells are empty between launches (cells.cuh)
//
// A rank has no slot for itself: it takes its own part from its input.
//
// Consecutive launches use different phases, so a launch needn't wait at its end until its peers have read its data.
// This holds for any sequence of algorithms, grids and sizes. It also holds when blocks of a launch start before the
// launch before it has ended (comm_core/pdl.cuh), since they access no slot before `wait_for_predecessors`:
//
// A rank fills the phase of launch k again in its launch k + 2. By then its launch k + 1 has ended, in which it heard
// from every peer. A peer sends nothing in launch k + 1 before its own launch k has ended. So every peer has read and
// emptied the cells of launch k.
//
// A rank hears from every peer in each launch: with two-shot push because every rank owns a part, for which
// two_shot_vecs() is the condition (twoshot_push_fp8.cuh counts chunks instead of vectors), and with a message of less
// than a vector by its tail.
//
// To hear is a relaxed load, which gives no order. None is needed: the peer's stores of launch k were performed in its
// memory when that launch ended, before it could send anything in launch k + 1. The end of a launch is the only fence
// that this argument needs, and wait_for_predecessors() returns after it.
//
// On padded batches the number of real rows decides how much of a message is sent; padded.cuh has what that adds.
//
// All this takes for granted that ranks come with the same messages. If they don't, some rank times out. A rank with a
// longer message than a peer's waits for cells that the peer doesn't fill. If the sizes are equal, each dtype, and
// plain and fused calls, have their cells a few pages further in the slot (kKinds), so each rank waits for a cell that
// the other doesn't fill; tails have a slot of their own for each dtype and length.
//
// What is left of a longer message stays in the cells of the peer that didn't wait for it. That peer can't come to
// these cells in its launch k + 2 without hearing from the longer message's sender in launch k + 1, and the sender is
// still in launch k, until it has timed out and so reported. Launches that it had queued by then do run, without
// waiting: until its host notices the timeout, the peer may sum what they send.
//
// Lineage: pushes into slots of two phases are those of SGLang's second version (custom_all_reduce_push.cuh).
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

// Three dtypes, plain and fused: the cells of each kind of call begin this much later in a slot.
constexpr int64_t kKinds = 6, kKindNbytes = 4096;
// The lengths of a tail, of 2 to 14 bytes.
constexpr uint64_t kTailLengths = 8;

// The fewest vectors of a message for two-shot push, with which no rank's part is empty.
constexpr uint32_t two_shot_vecs(int world_size) {
    return world_size * world_size;
}

enum class Algorithm : int32_t {
    kOneShotPush = 0,     // oneshot_push.cuh
    kOneShotStream = 1,   // oneshot_stream.cuh
    kTwoShotPush = 2,     // twoshot_push.cuh
    kTwoShotPushFp8 = 3,  // twoshot_push_fp8.cuh
    kOneShotPushFp8 = 4,  // oneshot_push_fp8.cuh
    kCount = 5,
};

struct Params {
    const char* input;
    char* output;
    char* buffers[kMaxRanks];  // by rank, as this device maps them
    comm_core::Bound bound;
    uint64_t tails_at;
    uint64_t cells_at, cells_nbytes;  // offset of the first slot, size of each
    uint32_t num_vecs;                // whole vectors of the message
    uint32_t tail_nbytes;             // bytes after them, 0 to 14
    uint32_t rank;
    uint32_t pipeline_depth;  // rounds by which pushes run ahead of sums, in kernels that let them
};

// Chooses the cells of a call's kind. `params` has the offsets of the regions, and the tail's length.
inline void choose_cells(Params& params, int world_size, comm_core::Element element, bool fused) {
    const auto dtype = static_cast<uint64_t>(element);
    const auto tails_nbytes = static_cast<uint64_t>(2 * (world_size - 1) * comm_core::kVecNbytes);
    params.cells_at += (dtype + (fused ? kKinds / 2 : 0)) * kKindNbytes;
    params.tails_at += (dtype * kTailLengths + params.tail_nbytes / 2) * tails_nbytes;
}

__device__ __forceinline__ unsigned long long* counter_of(const Params& params) {
    return reinterpret_cast<unsigned long long*>(params.buffers[params.rank]);
}

// The slots of a launch's phase, in one region of the buffers.
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

    // Returns the slot that this rank fills at the d-th rank after it, counted from 0. So ranks begin with different
    // peers, and don't all push to the same one at first.
    __device__ __forceinline__ char* theirs(int d) const {
        if constexpr (W == 2) {
            return theirs_;
        } else {
            const uint32_t peer = after(rank_, d);
            // Among the slots of `peer`, this rank's has the index `rank_`, or one less if `peer` comes before this
            // rank.
            return buffers_[peer] + first_ + (rank_ - (rank_ > peer)) * nbytes_;
        }
    }

    // Returns one of this rank's slots; their order is that of the ranks that fill them.
    __device__ __forceinline__ char* mine(int slot) const { return mine_ + slot * nbytes_; }

    __device__ __forceinline__ uint64_t nbytes() const { return nbytes_; }

    static __device__ __forceinline__ uint32_t after(uint32_t rank, int d) {
        const uint32_t peer = rank + 1 + d;
        return peer < W ? peer : peer - W;
    }

    // Returns the rank that fills the slot `slot` of rank `rank`.
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

// Selects by value: a choice between two vectors' addresses would put them into memory.
__device__ __forceinline__ Vec either(bool first, const Vec& one, const Vec& other) {
    return {first ? one.x : other.x, first ? one.y : other.y, first ? one.z : other.z, first ? one.w : other.w};
}

// Sums this rank's vector and its peers' vectors in rank order. `theirs` is in rank order, without this rank.
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

// The most threads of a block, by the vectors that each has in flight: the limit comes from registers.
__host__ __device__ constexpr int max_threads(int world_size, int vecs) {
    if (world_size == 2) return vecs >= 4 ? 512 : 1024;
    return (world_size - 1) * vecs >= 5 ? 256 : 512;
}

}  // namespace comm_customar_v2
