// Launches on padded batches: the number of real rows is read on the device.
//
// A graph is captured for a bucket of rows, and replayed with fewer. One kernel serves every number: it has the code of
// one-shot and of two-shot push, and chooses by the number. All ranks hold equal numbers, so they choose alike; that
// launches with different algorithms and sizes follow each other is nothing new (params.cuh). The grid is that of the
// bucket. Blocks without real rows end at once, so the next launch's blocks have room to start and wait. The first
// blocks load their part of the input beside the number, so that few rows don't wait for one load after the other.
//
// At least one row is sent, whatever the number, so that a rank hears from every peer in each launch; two-shot takes
// more rows than there are ranks anyway. The sums of rows of padding are right or left out; they are unspecified.
//
// If the numbers differ, a rank has a longer message than a peer, as in params.cuh: it waits for cells that the peer
// doesn't fill, and times out. This also holds if one rank takes one-shot and its peer two-shot: the longer message is
// the latter's, which waits for sums in the upper half of its slots, and one-shot fills only the lower half
// (`session.cuh` and `norm_session.cuh` see to that). Numbers that give the same message, as 0 and 1, don't differ.
#pragma once

#include "params.cuh"

namespace comm_customar_v2 {

// The number of real rows, and what a launch makes of it. Sizes are in vectors of the message, or in rows if fused.
struct Padding {
    const int32_t* num_tokens;  // on the device, equal on all ranks; any value
    int32_t num_rows;           // of the whole batch
    uint32_t one_shot;          // the largest size for one-shot push
    uint64_t row_nbytes;        // 1 in fused launches, whose unit is the row
    uint64_t done;              // bytes, or rows, of the batch before this launch's message
};

// Returns how much of a message of `size` units is real, at least one unit. Call it after `wait_for_predecessors`,
// since a kernel before may write the number. `kUnit` is 16 for vectors, 1 for rows.
template <uint32_t kUnit>
__device__ __forceinline__ uint32_t real_size(const Padding& padding, uint32_t size) {
    const int32_t number = *padding.num_tokens;
    const uint64_t rows = static_cast<uint64_t>(number < 0 ? 0 : number < padding.num_rows ? number : padding.num_rows);
    const uint64_t end = rows * padding.row_nbytes;
    const uint64_t left = end > padding.done ? (end - padding.done + kUnit - 1) / kUnit : 0;
    return left < 1 ? min(size, 1u) : left < size ? static_cast<uint32_t>(left) : size;
}

// The world sizes with kernels for padded batches, for two dtypes of 16 bit. Others sum all rows: a kernel more for
// each takes time to compile and room in the wheel.
__host__ __device__ constexpr bool has_padded(int world_size) {
    return world_size == 2 || world_size == 4 || world_size == 8;
}

}  // namespace comm_customar_v2
