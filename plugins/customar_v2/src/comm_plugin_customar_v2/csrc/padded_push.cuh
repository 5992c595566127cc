// One-shot or two-shot push of a padded batch, by its number of real rows; padded.cuh describes both.
#pragma once

#include "oneshot_push.cuh"
#include "padded.cuh"
#include "twoshot_push.cuh"

namespace comm_customar_v2 {

struct PaddedParams {
    Params plain;
    Padding padding;
};

// So many threads a block that a multiprocessor's registers hold a block of each of two launches.
__host__ __device__ constexpr int max_padded_threads(int world_size) {
    return world_size == 2 ? 512 : world_size <= 4 ? 256 : 128;
}

// The most rounds by which pushes run ahead of sums, in two-shot.
constexpr uint32_t kPaddedDepth = 1;

// The first threads load their vectors beside the number of real rows, since most replays have few: 256 KiB.
constexpr uint32_t kEarlyVecs = 16384;

template <typename T, int W>
__global__ void __launch_bounds__(max_padded_threads(W), 2) padded_push(const __grid_constant__ PaddedParams padded) {
    const Params& params = padded.plain;
    const unsigned long long epoch = comm_core::next_epoch(counter_of(params));
    const Slots<W> slots(params, params.cells_at, params.cells_nbytes, epoch);
    const uint32_t stride = comm_core::ready(threads_in_grid()), thread = comm_core::ready(thread_in_grid());
    Cells<W> cells(slots, thread * 16);
    comm_core::SpinGuard guard;
    comm_core::wait_for_predecessors();

    const bool is_early = thread < min(kEarlyVecs, params.num_vecs);
    const char* const input = params.input + thread * 16;
    Vec early{};
    if (is_early) early = comm_core::load(input);
    const uint32_t num_vecs = real_size<comm_core::kVecNbytes>(padded.padding, params.num_vecs);
    if (num_vecs <= padded.padding.one_shot) {
        char* const output = params.output + thread * 16;
        push_and_sum<T, W, 1>(params, input, output, cells, num_vecs, thread, stride, guard, is_early, early);
    } else {
        sum_parts<T>(params, slots, Cells<W>(slots, 0), Parts<W, 1>(params, num_vecs), guard);
    }
    sum_tail<T, W>(params, epoch, guard);
}

}  // namespace comm_customar_v2
