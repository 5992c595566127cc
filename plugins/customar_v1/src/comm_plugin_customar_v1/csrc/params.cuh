// What every kernel is launched with, how a rank's buffer is laid out, and how two phases of it make one barrier
// enough.
//
// A rank's buffer, the same on all ranks, begins with the launch counter and the barriers' flags; then come
//
//   letters  what the ranks write to each other once, to see that peer access works (letters.cuh)
//   staging  2 phases of a copy of the message
//
// A launch copies its input to its phase of the staging, meets its peers, and reads theirs: a pull. Between launches
// the phases alternate, so that nobody waits at the end until all have read. It is enough whatever algorithms, grids
// and sizes the launches have, and although a launch's blocks may be there before the launch before has ended
// (comm_core/pdl.cuh): they touch no staging before `wait_for_predecessors`. I write the phase of launch k again in
// launch k + 2. My launch k + 1 has ended by then, and each of its blocks met every peer's; a peer tells in launch k +
// 1 only after its launch k has ended, and with it the reading of what I staged for k.
//
// The first barrier of a launch is where that order comes from: its acquire load follows the peer's release store, and
// that the end of the peer's launch before (pdl.cuh).
#pragma once

#include <comm_core/barrier.cuh>
#include <comm_core/epoch.cuh>
#include <comm_core/grid.cuh>
#include <comm_core/memory.cuh>
#include <comm_core/pdl.cuh>
#include <comm_core/vec.cuh>
#include <comm_core/wait.cuh>

#include <cstddef>
#include <cstdint>

namespace comm_customar_v1 {

using comm_core::thread_in_grid;
using comm_core::threads_in_grid;
using comm_core::Vec;

constexpr int kMaxRanks = comm_core::kMaxRanks;
// Blocks that have flags, thus the largest grid.
constexpr uint32_t kMaxBlocks = 512;
// Where the barriers' flags begin; the counter has the line before.
constexpr uint64_t kFlagsAt = 256;
// Of a block: with what a thread has in flight, their registers fill a multiprocessor.
constexpr int kMaxThreads = 512;

enum class Algorithm : int32_t {
    kOneStage = 0,  // one_stage.cuh
    kTwoStage = 1,  // two_stage.cuh
    kCount = 2,
};

struct Params {
    const char* input;
    char* output;
    char* buffers[kMaxRanks];  // by rank, as this device sees them
    comm_core::Bound bound;
    uint64_t staging_at, staging_nbytes;  // of a phase
    uint32_t num_vecs;                    // whole ones
    uint32_t tail_nbytes;                 // what follows them, 0 to 14
    uint32_t rank;
};

__device__ __forceinline__ unsigned long long* counter_of(const Params& params) {
    return reinterpret_cast<unsigned long long*>(params.buffers[params.rank]);
}

// Where a launch finds what it sums and what it gathers. Inputs that peers read in place, without a copy, would need
// another one of these, and a barrier at the launch's end, since their owner may write to them after it.
class Staged {
  public:
    __device__ __forceinline__ Staged(const Params& params, unsigned long long epoch)
        : params_(params), at_(params.staging_at + (epoch & 1) * params.staging_nbytes) {}

    // This rank's copy.
    __device__ __forceinline__ char* mine() const { return params_.buffers[params_.rank] + at_; }

    // Any rank's copy.
    __device__ __forceinline__ const char* copy_of(int rank) const { return params_.buffers[rank] + at_; }

    // What a rank's terms are read from: of this rank, the input itself.
    __device__ __forceinline__ const char* terms_of(int rank) const {
        return rank == static_cast<int>(params_.rank) ? params_.input : copy_of(rank);
    }

  private:
    const Params& params_;
    uint64_t at_;
};

// The sum of one vector of every rank, in rank order.
template <typename T, int W>
__device__ __forceinline__ Vec sum_of(const Vec (&vecs)[W]) {
    comm_core::Sum<T> sum(vecs[0]);
#pragma unroll
    for (int q = 1; q < W; ++q) sum.add(vecs[q]);
    return sum.rounded();
}

// A vector from a peer's staging, or this rank's. Relaxed at system scope: the barrier before orders it, and the
// first-level cache, which may hold what the place had two launches ago, is bypassed.
__device__ __forceinline__ Vec pull(const char* address) {
    return comm_core::load_relaxed_sys(address);
}

template <int W>
__device__ __forceinline__ void meet(const Params& params,
                                     uint32_t stage,
                                     unsigned long long epoch,
                                     comm_core::SpinGuard& guard) {
    comm_core::barrier<W>(params.buffers, kFlagsAt, params.rank, stage, epoch, params.bound, guard);
}

// The tail: what of a message is less than a vector. One thread stages it before the launch's first barrier and sums it
// after, whatever the algorithm. It reads and writes the tensors element by element: behind the tail may lie another
// tensor's data, or nothing. In a launch of one round it is in a warp that has nothing else to do (`run` in session.cuh
// makes room for it).
__device__ __forceinline__ bool has_tail(const Params& params) {
    return params.tail_nbytes != 0 && thread_in_grid() == (params.num_vecs + 31) / 32 * 32 % threads_in_grid();
}

__device__ __forceinline__ void stage_tail(const Params& params, const Staged& staged) {
    if (!has_tail(params)) return;
    const size_t at = static_cast<size_t>(params.num_vecs) * 16;
    comm_core::store(staged.mine() + at, comm_core::load_part(params.input + at, params.tail_nbytes));
}

template <typename T, int W>
__device__ __forceinline__ void sum_tail(const Params& params, const Staged& staged) {
    if (!has_tail(params)) return;
    const size_t at = static_cast<size_t>(params.num_vecs) * 16;
    Vec vecs[W];
#pragma unroll
    for (int q = 0; q < W; ++q) vecs[q] = pull(staged.copy_of(q) + at);
    comm_core::store_part(params.output + at, sum_of<T, W>(vecs), params.tail_nbytes);
}

}  // namespace comm_customar_v1
