// The parameters of every kernel, the layout of a rank's buffer, and why two phases make one barrier enough.
//
// A rank's buffer has the same layout on all ranks. It begins with the launch counter and the barriers' flags; then
// come
//
//   test     the pages of the peer-access test (peer_access_test.cuh)
//   staging  2 phases, each a copy of the message
//
// A launch copies its input to its phase of the staging, passes a barrier with its peers, and reads the peers' copies:
// a pull. Consecutive launches use different phases, so a launch needn't wait at its end until all peers have read.
// This holds for any sequence of algorithms, grids and sizes. It also holds when blocks of a launch start before the
// launch before it has ended (comm_core/pdl.cuh), since they touch no staging before `wait_for_predecessors`:
//
// A rank overwrites the phase of launch k in its launch k + 2. By then its launch k + 1 has ended, in which each block
// passed a barrier with every peer. A peer enters that barrier only after its own launch k has ended, and with it the
// peer's reading of launch k's phase.
//
// This takes for granted that ranks come with the same messages. If they don't, the barrier's tags differ, and a rank
// whose session is over by that reports it.
//
// The first barrier of a launch gives this order: its acquire load follows the peer's release store, which follows the
// end of the peer's launch before (pdl.cuh).
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
// The largest grid: the barriers have flags for so many blocks.
constexpr uint32_t kMaxBlocks = 512;
// Offset of the barriers' flags; the counter lies before them.
constexpr uint64_t kFlagsAt = 256;
// The largest block: its threads' registers fill a multiprocessor.
constexpr int kMaxThreads = 512;

enum class Algorithm : int32_t {
    kOneStage = 0,  // one_stage.cuh
    kTwoStage = 1,  // two_stage.cuh
    kCount = 2,
};

struct Params {
    const char* input;
    char* output;
    char* buffers[kMaxRanks];  // by rank, as this device maps them
    comm_core::Bound bound;
    uint64_t staging_at, staging_nbytes;  // offset of the first phase, size of each
    uint32_t num_vecs;                    // whole vectors of the message
    uint32_t tail_nbytes;                 // bytes after them, 0 to 14
    uint32_t rank;
    uint32_t tag;  // of the message, by which ranks notice that they differ (comm_core/barrier.cuh)
};

__device__ __forceinline__ unsigned long long* counter_of(const Params& params) {
    return reinterpret_cast<unsigned long long*>(params.buffers[params.rank]);
}

// Where a launch reads the messages that it sums and the sums that it gathers: in the staging of its phase.
class Staged {
  public:
    __device__ __forceinline__ Staged(const Params& params, unsigned long long epoch)
        : params_(params), at_(params.staging_at + (epoch & 1) * params.staging_nbytes) {}

    // This rank's copy of the message.
    __device__ __forceinline__ char* mine() const { return params_.buffers[params_.rank] + at_; }

    // Any rank's copy of the message.
    __device__ __forceinline__ const char* copy_of(int rank) const { return params_.buffers[rank] + at_; }

    // Where a rank's message is read: this rank's in the input itself.
    __device__ __forceinline__ const char* terms_of(int rank) const {
        return rank == static_cast<int>(params_.rank) ? params_.input : copy_of(rank);
    }

  private:
    const Params& params_;
    uint64_t at_;
};

// Sums one vector of every rank, in rank order.
template <typename T, int W>
__device__ __forceinline__ Vec sum_of(const Vec (&vecs)[W]) {
    comm_core::Sum<T> sum(vecs[0]);
#pragma unroll
    for (int q = 1; q < W; ++q) sum.add(vecs[q]);
    return sum.rounded();
}

// Loads a vector from a rank's staging. Relaxed at system scope: the barrier before it gives the order, and the load
// bypasses the first-level cache, which may hold the staging's content of two launches ago.
__device__ __forceinline__ Vec pull(const char* address) {
    return comm_core::load_relaxed_sys(address);
}

template <int W>
__device__ __forceinline__ void meet(const Params& params,
                                     uint32_t stage,
                                     unsigned long long epoch,
                                     comm_core::SpinGuard& guard) {
    comm_core::barrier<W>(params.buffers, kFlagsAt, params.rank, stage, epoch, params.tag, params.bound, guard);
}

// The tail is the end of a message, shorter than a vector. In every algorithm, one thread stages it before the launch's
// first barrier and sums it after. That thread accesses the tensors element by element, since another tensor's data, or
// unmapped memory, may follow the tail. If the threads sum the message in one round, the tail's thread is in a warp
// that has nothing else to do (`launch` in session.cuh enlarges the grid for it).
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
