// The tail: the elements of a message after its last whole vector.
//
// With every algorithm, one thread pushes it one-shot, through cells of its own. The thread reads and writes the tail
// element by element, since the bytes after it may be another tensor's, or unmapped. In a launch of one round the
// thread is in a warp without other work, so that no thread waits for two arrivals one after the other.
#pragma once

#include "cells.cuh"

namespace comm_customar_v2 {

template <typename T, int W>
__device__ __forceinline__ void sum_tail(const Params& params, unsigned long long epoch, comm_core::SpinGuard& guard) {
    if (params.tail_nbytes == 0) return;
    // The first thread of the warp after the last one with vectors; `launch` in session.cuh makes room for that warp.
    if (thread_in_grid() != (params.num_vecs + 31) / 32 * 32 % threads_in_grid()) return;
    const char* const input = params.input + params.num_vecs * 16;
    char* const output = params.output + params.num_vecs * 16;
    const Cells<W> cells(Slots<W>(params, params.tails_at, comm_core::kVecNbytes, epoch), 0);
    const Vec own = comm_core::load_part(input, params.tail_nbytes);
    cells.fill_theirs(0, escape_sentinel(own));
    Arrivals<W> arrivals;
    arrivals.look(cells, 0);
    arrivals.poll_until_full(cells, 0, params, guard);
    comm_core::store_part(output, sum_in_rank_order<T, W>(own, arrivals.vecs, params.rank), params.tail_nbytes);
    cells.empty_mine(0);
}

}  // namespace comm_customar_v2
